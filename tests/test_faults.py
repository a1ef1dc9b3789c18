"""What goes wrong is said in one line, and leaves everything as it was."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import LBFGS, SGD

import nets
import steppe
from recipes_list import EVERY, same, snapshot, step, weights, wrap
from steppe import linear, rst, rwp, sam, sgd

NAN, INF = float("nan"), float("inf")


class Poison:
    """A loss that is not finite: always, or where the weights have moved away from home."""

    def __init__(self, model: nn.Module, value: float, moved_only: bool) -> None:
        self.home, self.value, self.moved_only = weights(model), value, moved_only
        self.struck = False

    def __call__(self, model, data):
        losses = nets.losses(model, data)
        if self.moved_only and same(weights(model), self.home):
            return losses
        self.struck = True
        return losses * self.value


@pytest.mark.parametrize("moved_only", [False, True], ids=["pass_one", "pass_two"])
@pytest.mark.parametrize("text", EVERY)
def test_a_loss_that_is_not_finite_changes_nothing(text, moved_only):
    model, data = nets.mlp()
    opt = wrap(model, text)
    for number in range(3):
        twin, twin_opt = copy.deepcopy((model, opt))
        before, state = weights(model), snapshot(opt)
        dry = Poison(model, 1.0, moved_only)
        step(twin_opt, twin, data, dry)
        if dry.struck:  # a step without a pass two has nothing to be poisoned there
            poison = Poison(model, (NAN, INF)[number % 2], moved_only)
            with pytest.raises(
                ValueError, match=f"loss is .*(nan|inf).* at step {number}.*{re.escape(repr(opt.method))}"
            ):
                step(opt, model, data, poison)
        assert same(weights(model), before)
        assert same(snapshot(opt), state), f"at step {number}"
        step(opt, model, data)
        assert same(weights(model), weights(twin))


@pytest.mark.parametrize("text", ["sam(rho=1e38)", "esam(rho=1e38)", "rwp(gamma=1e38)", "sam(rho=1e38, steps=2)"])
def test_a_huge_radius_is_refused_by_its_loss(text):
    model, (x, y) = nets.mlp()
    model.float()
    opt, before = wrap(model, text), weights(model)
    with pytest.raises(ValueError, match="smaller learning rate or rho"):
        step(opt, model, (x.float(), y))
    assert same(weights(model), before)


@pytest.mark.parametrize("text", EVERY)
def test_a_flat_loss_gives_no_nan(text):
    """Where all gradients vanish, no direction is made up."""
    model, data = nets.mlp()
    base = SGD(model.parameters(), lr=0.1)
    opt = steppe.SharpnessAware(base, steppe.parse(text), total_steps=20)
    before = weights(model)
    for _ in range(4):
        step(opt, model, data, lambda model, data: nets.losses(model, data) * 0)
    assert same(weights(model), before)
    for _ in range(2):
        step(opt, model, data)
    assert all(t.isfinite().all() for t in weights(model))


def test_a_loss_without_curvature_has_no_second_order_term():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1).double(), torch.randn(4, 3, dtype=torch.float64)
    ends = []
    for text in ("sam()", "sam(second_order=True)"):
        twin = copy.deepcopy(model)
        wrap(twin, text).step(steppe.Batch(twin, lambda m, x: m(x).squeeze(1), x))
        ends.append(weights(twin))
    assert same(*ends)


@pytest.mark.parametrize("text", EVERY)
def test_a_batch_of_one(text):
    model, (x, y) = nets.mlp()
    opt = wrap(model, text)
    for _ in range(4):
        assert step(opt, model, (x[:1], y[:1])).isfinite()
    assert all(t.isfinite().all() for t in weights(model))
    assert opt.stats.examples == 4


def test_at_least_one_example_is_kept():
    model, data = nets.mlp()
    sizes = []
    model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    step(wrap(model, "esam_sds(gamma=0.01)"), model, data)
    assert sizes == [nets.B, nets.B, 1]


def test_no_parameter_to_train():
    model, _ = nets.mlp()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad"):
        wrap(model, "sam()")


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("text", ["sgd()", "sam()", "esam()", "ssam(refresh=1)", "m_sharpness(sam(), 5)", "rwp()"])
@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda model, data: nets.losses(model, data)[:, None],
        lambda model, data: nets.losses(model, data).mean().item(),
        lambda model, data: None,
        lambda model, data: nets.losses(model, data).tolist(),
        lambda model, data: nets.losses(model, data).mean().reshape(1),
        lambda model, data: nets.losses(model, data).repeat(2),
        lambda model, data: nets.losses(model, data)[1:],
    ],
    ids=["column", "float", "none", "list", "mean_of_shape_1", "double", "one_short"],
)
def test_a_loss_of_another_shape(text, micro, loss_fn):
    model, data = nets.mlp()
    before = weights(model)
    with pytest.raises(TypeError, match="reduction='none'"):
        step(wrap(model, text), model, data, loss_fn, micro=micro)
    assert same(weights(model), before)


def test_batches_that_make_no_sense():
    model, (x, y) = nets.mlp()
    with pytest.raises(ValueError, match="empty"):
        steppe.Batch(model, nets.losses, (x[:0], y[:0]))
    for micro in (0, -1, 13):
        with pytest.raises(ValueError, match=rf"micro={micro} .*12"):
            steppe.Batch(model, nets.losses, (x, y), micro=micro)
    for data in (None, 3, "text", [], {}, torch.tensor(1.0), (1, 2)):
        with pytest.raises(TypeError, match="batch dimension"):
            steppe.Batch(model, nets.losses, data)


def test_a_closure_that_returns_nothing():
    model, data = nets.mlp()
    opt, before = wrap(model, "sam()"), weights(model)

    def closure():
        nets.losses(model, data).mean().backward()

    with pytest.raises(TypeError, match="return the loss"):
        opt.step(closure)
    assert same(weights(model), before)


@pytest.mark.parametrize("thing", [None, 3, torch.tensor(1.0), (1, 2), "sam()"])
def test_a_step_on_something_else(thing):
    model, _ = nets.mlp()
    with pytest.raises(TypeError, match=r"steppe\.Batch"):
        wrap(model, "sam()").step(thing)


def test_bases_that_take_no_gradient():
    model, _ = nets.mlp()
    for base in (LBFGS(model.parameters()), wrap(model, "sam()"), model, None, SGD):
        with pytest.raises(TypeError, match="base is"):
            steppe.SharpnessAware(base, sam())


def test_methods_that_are_none():
    base = SGD(nets.mlp()[0].parameters(), lr=0.1)
    for method in ("sam()", sam, None, 0.05, linear(0, 1)):
        with pytest.raises(TypeError, match=r"steppe\.parse"):
            steppe.SharpnessAware(base, method)


@pytest.mark.parametrize("text", ["rst(sam(), p=linear(0, 1))", "ssam_dynamic()", "looksam(rst(sam(), p=cosine()))"])
def test_a_schedule_needs_the_length_of_the_training(text):
    model, _ = nets.mlp()
    with pytest.raises(ValueError, match="total_steps=<"):
        wrap(model, text, total_steps=None)
    with pytest.raises(ValueError, match="total_steps=0"):
        wrap(model, text, total_steps=0)


@pytest.mark.parametrize("text", EVERY)
def test_training_longer_than_was_said_goes_on(text):
    model, data = nets.mlp()
    opt = wrap(model, text, total_steps=1)
    for _ in range(3):
        assert step(opt, model, data).isfinite()


@pytest.mark.parametrize("text", EVERY)
def test_second_batches_are_neither_missing_nor_too_many(text):
    model, data = nets.mlp()
    opt, batch, before = wrap(model, text), steppe.Batch(model, nets.losses, data), weights(model)
    needed = opt.method.needs_second
    with pytest.raises(ValueError, match=r"takes a second batch" if needed else "takes no second batch"):
        opt.step(batch, None if needed else batch)
    assert same(weights(model), before)


def test_a_second_batch_must_be_a_batch():
    model, data = nets.mlp()
    with pytest.raises(TypeError, match="Batch"):
        wrap(model, "rwp(other=True)").step(steppe.Batch(model, nets.losses, data), data)


class Tied(nn.Module):
    """Two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6).double(), nn.Linear(6, 6).double()
        self.outer.weight = self.inner.weight

    def forward(self, x):
        return self.outer(self.inner(x).tanh())


class Spelled(nn.Module):
    """The same with one tensor used twice."""

    def __init__(self, tied: Tied) -> None:
        super().__init__()
        self.weight = nn.Parameter(tied.inner.weight.detach().clone())
        self.bias1 = nn.Parameter(tied.inner.bias.detach().clone())
        self.bias2 = nn.Parameter(tied.outer.bias.detach().clone())

    def forward(self, x):
        return F.linear(F.linear(x, self.weight, self.bias1).tanh(), self.weight, self.bias2)


@pytest.mark.parametrize("text", [t for t in EVERY if "by_name" not in t])
def test_tied_parameters_are_one(text):
    torch.manual_seed(0)
    tied = Tied()
    spelled, data = Spelled(tied), nets.mlp()[1]
    for model in (tied, spelled):
        opt = wrap(model, text)
        for _ in range(4):
            step(opt, model, data)
    assert tied.outer.weight is tied.inner.weight
    assert same([p.detach() for p in tied.parameters()], [p.detach() for p in spelled.parameters()])


def test_sgd_and_a_radius_of_zero_are_the_base_alone():
    ends = []
    for method in (None, sgd(), sam(0.0), rwp(gamma=0), rst(sam(), p=0)):
        model, data = nets.transformer()
        base = SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        opt = steppe.SharpnessAware(base, method) if method else base
        for _ in range(4):
            if method:
                step(opt, model, data)
            else:
                base.zero_grad()
                nets.losses(model, data).mean().backward()
                base.step()
        ends.append(weights(model))
    assert all(same(end, ends[0]) for end in ends)
