"""The wrapper is an optimizer: schedulers, checkpoints, copies, hooks, gradients, closures."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, ReduceLROnPlateau, SequentialLR, StepLR

import nets
import steppe
from recipes_list import BASES, EVERY, same, snapshot, step, weights, wrap

SCHEDULERS = {
    "step": lambda opt: StepLR(opt, step_size=1, gamma=0.5),
    "cosine": lambda opt: CosineAnnealingLR(opt, T_max=3),
    "one_cycle": lambda opt: OneCycleLR(opt, max_lr=0.1, total_steps=8),
    "sequential": lambda opt: SequentialLR(opt, [LinearLR(opt, 0.1, total_iters=1), StepLR(opt, 1)], milestones=[1]),
    "plateau": lambda opt: ReduceLROnPlateau(opt, patience=0, threshold=10.0),
}


def rates(make, base: str, on: str, text: str) -> list[float]:
    """Learning rates that the base has after each of three steps."""
    model, data = nets.mlp()
    opt = wrap(model, text, base)
    scheduler = make(opt if on == "wrapper" else opt.base)
    seen = []
    for _ in range(3):
        loss = step(opt, model, data)
        scheduler.step(*[float(loss)] if isinstance(scheduler, ReduceLROnPlateau) else [])
        seen.append(opt.base.param_groups[0]["lr"])
        assert opt.param_groups is opt.base.param_groups
    return seen


def plain_rates(make, base: str) -> list[float]:
    opt = BASES[base]([nn.Parameter(torch.ones(1))])
    scheduler = make(opt)
    seen = []
    for _ in range(3):
        opt.step()
        scheduler.step(*[1.0] if isinstance(scheduler, ReduceLROnPlateau) else [])
        seen.append(opt.param_groups[0]["lr"])
    return seen


def reaches_the_base(text: str, base: str, name: str, on: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="The epoch parameter in")  # SequentialLR's own
        expected = plain_rates(SCHEDULERS[name], base)
        assert len(set(expected)) > 1
        assert rates(SCHEDULERS[name], base, on, text) == expected


@pytest.mark.parametrize("on", ["wrapper", "base"])
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("base", BASES)
def test_every_scheduler_reaches_every_base(base, name, on):
    reaches_the_base("sam()", base, name, on)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("text", EVERY)
def test_schedulers_reach_the_base_under_every_method(text, base):
    turn = EVERY.index(text) + list(BASES).index(base)
    reaches_the_base(text, base, list(SCHEDULERS)[turn % 5], ("wrapper", "base")[turn // 5 % 2])


@pytest.mark.parametrize("name", ["step", "cosine", "one_cycle", "sequential"])  # which leaves no peak in the groups
def test_rho_follows_the_scheduler(name):
    model, data = nets.mlp()
    opt = wrap(model, "gsam(rho=0.2, rho_min=0.01)")
    scheduler, radii = SCHEDULERS[name](opt), []
    for _ in range(4):
        radii.append(opt.method.when(opt._point([], 0)))
        step(opt, model, data)
        scheduler.step()
    assert all(0.01 <= rho <= 0.2 for rho in radii)
    assert len(set(radii)) > 1


def through_disk(*states):
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_copy_under_a_scheduler_steps_itself():
    model, data = nets.mlp()
    opt = wrap(model, "sam()")
    scheduler = StepLR(opt, 1)
    step(opt, model, data)
    scheduler.step()
    twin, twin_opt = copy.deepcopy((model, opt))
    before = weights(model)
    step(twin_opt, twin, data)
    assert same(weights(model), before)
    step(opt, model, data)
    assert same(weights(model), weights(twin))


def test_checkpoints_of_other_methods_are_refused_by_name():
    model, data = nets.mlp()
    saver, loader = wrap(model, "rst(sam(), p=0.25)"), wrap(model, "esam(gamma=0.25)")
    step(saver, model, data)
    step(loader, model, data)
    before, stats = snapshot(loader), copy.copy(loader.stats)
    with pytest.raises(ValueError, match=r"rst\(sam\(\), p=0.25\).*esam\(gamma=0.25\)"):
        loader.load_state_dict(saver.state_dict())
    assert same(snapshot(loader), before)
    assert loader.stats == stats


def test_a_checkpoint_of_the_base_alone_is_accepted():
    model, data = nets.mlp()
    opt = wrap(model, "looksam(k=2)", "adamw")
    for _ in range(3):
        step(opt, model, data)
    (saved,) = through_disk(opt.base.state_dict())
    other = wrap(model, "looksam(k=2)", "adamw")
    step(other, model, data)
    other.load_state_dict(saved)
    assert same(other.base.state_dict(), opt.base.state_dict())
    assert other.stats == steppe.Stats()
    assert other.state_dict()["param_groups"][0]["steppe"]["memories"] == {"gv": False}
    opt.base.load_state_dict(opt.state_dict())


@pytest.mark.parametrize("text", EVERY)
def test_added_groups_are_trained(text):
    body, data = nets.mlp()
    head = nn.Linear(nets.CLASSES, nets.CLASSES).double()
    model = nn.Sequential(body, head)
    opt = wrap(body, text)
    step(opt, model, data)
    before = weights(head)
    opt.add_param_group({"params": head.parameters(), "lr": 0.5})
    assert opt.param_groups is opt.base.param_groups
    assert len(opt.base.param_groups) == 2
    for _ in range(4):
        step(opt, model, data)
    assert all(not torch.equal(a, b) for a, b in zip(before, weights(head), strict=True))
    assert opt.base.state[head.weight]["momentum_buffer"] is not None


@pytest.mark.parametrize("text", EVERY)
def test_frozen_and_unused_parameters_stay_as_they_are(text):
    model, data = nets.mlp()
    model[2].weight.requires_grad_(False)
    model.spare = nn.Parameter(torch.ones(3, dtype=torch.float64))  # in no forward pass
    spare = model.spare
    opt = wrap(model, text)
    before = weights(model[2])[0]
    for _ in range(4):
        step(opt, model, data)
        assert spare.grad is None
        assert model[2].weight.grad is None
    assert torch.equal(model[2].weight, before)
    assert torch.equal(spare, torch.ones_like(spare))
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("text", ["sgd()", "sam()", "esam()", "rwp()"])
def test_a_parameter_frozen_on_the_way_stops(text):
    """The direction that the last step left in its ``.grad`` is stale."""
    model, data = nets.mlp()
    opt = wrap(model, text)
    step(opt, model, data)
    model[0].weight.requires_grad_(False)
    before = weights(model)[0]
    for _ in range(2):
        step(opt, model, data)
    assert torch.equal(model[0].weight, before)


class Branch(nn.Module):
    """A layer that only some calls of a step use."""

    def __init__(self, body: nn.Module, first: bool) -> None:
        super().__init__()
        self.body, self.first, self.calls = body, first, 0
        self.extra = nn.Linear(nets.CLASSES, nets.CLASSES).double()

    def forward(self, x):
        self.calls += 1
        out = self.body(x)
        return self.extra(out) if (self.calls == 1) == self.first else out


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("text", EVERY)
def test_gradients_that_only_one_pass_has(text, first):
    body, data = nets.mlp()
    model = Branch(body, first)
    opt = steppe.SharpnessAware(SGD(model.parameters(), lr=0.0), steppe.parse(text), total_steps=20)
    before = weights(model)
    for _ in range(4):
        model.calls = 0
        step(opt, model, data)
        assert same(weights(model), before)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


class Failing:
    """A loss that raises at one of its calls."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, model, data):
        self.calls += 1
        if self.calls == self.at:
            raise RuntimeError("out of memory")
        return nets.losses(model, data)


@pytest.mark.parametrize("text", EVERY)
def test_an_exception_in_any_pass_changes_no_weight(text):
    """Whichever call fails, weights, base and memories are as before, and the same step then succeeds."""
    model, data = nets.mlp()
    opt = wrap(model, text, "adamw")
    for _ in range(3):
        twin, twin_opt = copy.deepcopy((model, opt))
        dry = Failing(0)
        step(twin_opt, twin, data, dry)
        before, state = weights(model), snapshot(opt)
        for at in range(1, dry.calls + 1):
            with pytest.raises(RuntimeError, match="out of memory"):
                step(opt, model, data, Failing(at))
            assert same(weights(model), before)
            assert same(snapshot(opt), state), f"call {at} of {dry.calls} at step {opt.stats.steps}"
        step(opt, model, data)
        assert same(weights(model), weights(twin))


@pytest.mark.parametrize("text", EVERY)
def test_an_exception_in_the_base_changes_no_weight(text):
    model, data = nets.mlp()
    opt = wrap(model, text)
    step(opt, model, data)
    before, right = weights(model), opt.base.step

    def failing(closure=None):
        raise RuntimeError("in the base")

    opt.base.step = failing
    with pytest.raises(RuntimeError, match="in the base"):
        step(opt, model, data)
    assert same(weights(model), before)
    opt.base.step = right
    step(opt, model, data)
    assert not same(weights(model), before)


@pytest.mark.parametrize("text", EVERY)
def test_stale_gradients_do_not_matter(text):
    ends = []
    for stale in (True, False):
        model, data = nets.mlp()
        opt = wrap(model, text)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.full_like(p, 1e3) if stale else None
            step(opt, model, data)
        ends.append([weights(model), [p.grad for p in model.parameters()]])
    assert same(*ends)


@pytest.mark.parametrize("text", EVERY)
def test_the_direction_is_left_in_grad(text):
    model, data = nets.mlp()
    opt = steppe.SharpnessAware(SGD(model.parameters(), lr=0.5), steppe.parse(text), total_steps=20)
    for _ in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        step(opt, model, data)
        for p, old in zip(model.parameters(), before, strict=True):
            assert torch.equal(p.detach(), old.add(p.grad, alpha=-0.5))


@pytest.mark.parametrize("text", EVERY)
def test_it_is_an_optimizer(text):
    model, data = nets.mlp()
    opt = wrap(model, text)
    calls = []
    assert isinstance(opt, Optimizer)
    assert opt.param_groups is opt.base.param_groups
    assert opt.defaults == opt.base.defaults
    assert "SharpnessAware" in repr(opt)
    before = opt.register_step_pre_hook(lambda *args: calls.append("before"))
    opt.register_step_post_hook(lambda *args: calls.append("after"))
    opt.base.register_step_post_hook(lambda *args: calls.append("base"))
    step(opt, model, data)
    assert calls == ["before", "base", "after"]
    before.remove()
    step(opt, model, data)
    assert calls[3:] == ["base", "after"]
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    opt.param_groups[0]["lr"] = 0.0
    assert opt.base.param_groups[0]["lr"] == 0.0


def test_the_loss_returned_is_that_of_pass_one():
    for text in EVERY:
        model, data = nets.mlp()
        expected = nets.losses(model, data).mean()
        loss = step(wrap(model, text), model, data)
        assert loss.ndim == 0
        assert not loss.requires_grad
        if text != "rwp(alpha=0)":
            torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
