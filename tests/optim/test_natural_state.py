"""NaturalGradient as an optimizer: resume, groups, schedulers, low precision, and what is refused."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

import nets
import steppe
from recipes_list import same, weights
from steppe.optim import NaturalGradient

FISHERS = ["exact", "mc", "empirical", "diagonal", "kfac", "ekfac"]


def made(fisher="kfac", net=nets.mlp, **how):
    model, data = net()
    how = {"damping": 0.1, "n": 2, "n_inverse": 4, "fisher": fisher, **how}
    return NaturalGradient(model.parameters(), 0.05, **how), model, data


def run(opt, model, data, steps=1):
    for _ in range(steps):
        loss = opt.step(steppe.Batch(model, nets.losses, data))
    return loss


def untouched(opt, model, data, match, loss_fn=nets.losses, error=ValueError):
    before, state = weights(model), copy.deepcopy(opt.state_dict()["state"])
    with pytest.raises(error, match=match):
        opt.step(steppe.Batch(model, loss_fn, data))
    assert all(map(torch.equal, before, weights(model)))
    assert same(state, opt.state_dict()["state"])


@pytest.mark.parametrize("done", [3, 5])
@pytest.mark.parametrize("fisher", FISHERS)
def test_resumes_to_the_bit_in_the_middle_of_an_interval(fisher, done):
    opt, model, data = made(fisher, n=4, n_inverse=8)
    run(opt, model, data, done)
    file = io.BytesIO()
    torch.save([model.state_dict(), opt.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, other, _ = made(fisher, n=4, n_inverse=8)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    for _ in range(6):
        assert torch.equal(run(opt, model, data), run(again, other, data))
    assert all(map(torch.equal, weights(model), weights(other)))


@pytest.mark.parametrize("fisher", FISHERS)
def test_groups_have_their_own_values(fisher):
    """A group that has no learning rate stays; λ → ∞ turns a group's move into a gradient step of lr/λ."""
    model, data = nets.mlp()
    first, *rest = list(model.children())[::2]
    groups = [
        {"params": list(first.parameters()), "lr": 0.0, "damping": 1e8},
        {"params": [p for layer in rest for p in layer.parameters()], "lr": 0.1 * 1e8, "damping": 1e8},
    ]
    opt = NaturalGradient(groups, 0.3, fisher=fisher, momentum=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    slopes = torch.autograd.grad(nets.losses(model, data).mean(), list(model.parameters()))
    run(opt, model, data)
    for i, (p, q, g) in enumerate(zip(before, model.parameters(), slopes, strict=True)):
        torch.testing.assert_close(q, p if i < 2 else p - 0.1 * g, rtol=1e-6, atol=1e-8)


def test_a_scheduler_and_weight_decay():
    opt, model, data = made(weight_decay=0.1)
    schedule = StepLR(opt, 1, 0.0)
    run(opt, model, data)
    schedule.step()
    before = weights(model)
    run(opt, model, data, 2)
    assert all(map(torch.equal, before, weights(model)))
    assert opt.steps == 3


def test_frozen_and_unused_parameters_stay():
    model = nn.ModuleDict({"used": nn.Linear(6, 3), "frozen": nn.Linear(6, 3), "idle": nn.Linear(6, 3)}).double()
    model["frozen"].requires_grad_(False)
    model.forward = lambda x: model["used"](x) + model["frozen"](x)
    _, data = nets.mlp()
    for fisher in FISHERS:
        opt = NaturalGradient(model.parameters(), 0.1, fisher=fisher, n=1, weight_decay=0.1)
        before = weights(model)
        run(opt, model, data, 2)
        moved = [not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True)]
        assert moved == [True, True, False, False, False, False]


def test_a_layer_that_is_unfrozen_joins_in():
    opt, model, data = made(n=10)
    model[0].requires_grad_(False)
    run(opt, model, data, 3)
    model[0].requires_grad_(True)
    before = weights(model)
    run(opt, model, data, 2)
    assert not any(map(torch.equal, before, weights(model)))


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("fisher", FISHERS)
def test_a_part_of_a_layer_is_frozen_and_unfrozen_between_two_looks(fisher, layer, frozen):
    """Its block is another one then, and what was kept of the old one is not that of the new one."""
    model, data = nets.mlp()
    opt = NaturalGradient(model.parameters(), 0.1, fisher=fisher, n=10)
    for required in (True, False, True):
        getattr(model[layer], frozen).requires_grad_(required)
        before = weights(model)
        run(opt, model, data, 2)
        still = [name for (name, _), p in zip(model.named_parameters(), before, strict=True)
                 if torch.equal(p, dict(model.named_parameters())[name])]  # fmt: skip
        assert still == ([] if required else [f"{layer}.{frozen}"])
    assert opt.steps == 6


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("low", ["autocast", "weights"])
def test_factors_are_float32_in_low_precision(fisher, low):
    model, (x, y) = nets.mlp()
    model = model.to(torch.bfloat16 if low == "weights" else torch.float32)
    x = x.to(torch.bfloat16 if low == "weights" else torch.float32)
    opt = NaturalGradient(model.parameters(), 0.05, fisher=fisher, damping=0.1, n=2)
    for _ in range(3):
        autocast = torch.bfloat16 if low == "autocast" else None
        assert opt.step(steppe.Batch(model, nets.losses, (x, y), autocast=autocast)).isfinite()
    assert {t.dtype for kept in opt.state.values() for t in kept.values()} == {torch.float32}
    assert all(p.isfinite().all() and p.dtype == next(model.parameters()).dtype for p in model.parameters())
    again = NaturalGradient(model.parameters(), 0.05, fisher=fisher, damping=0.1, n=2)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert same(again.state_dict()["state"], opt.state_dict()["state"])


def test_what_kfac_does_not_know_is_told_once():
    opt, model, data = made(net=nets.transformer)
    with pytest.warns(UserWarning, match="positions") as told:
        run(opt, model, data)
    assert len(told) == 1
    assert list(opt.fallback) == ["positions"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(opt, model, data, 3)


@pytest.mark.parametrize("fisher", FISHERS)
def test_no_trace_of_the_look_is_left(fisher):
    """Losses, statistics, dropout and the global generator are those of a plain pass."""
    nets_ = [nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 3)).double() for _ in "ab"]
    nets_[1].load_state_dict(nets_[0].state_dict())
    _, data = nets.mlp()
    opt = NaturalGradient(nets_[0].parameters(), 0.0, fisher=fisher, n=1, damping=0.1)
    for _ in range(3):
        torch.manual_seed(7)
        loss = opt.step(steppe.Batch(nets_[0], nets.losses, data))
        after = torch.get_rng_state()
        torch.manual_seed(7)
        plain = steppe.Batch(nets_[1], nets.losses, data).backward(None).mean()
        assert torch.equal(loss, plain)
        assert torch.equal(after, torch.get_rng_state())
        for p, q in zip(nets_[0].parameters(), nets_[1].parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
            q.grad = None
    assert all(map(torch.equal, weights(nets_[0]), weights(nets_[1])))
    assert not nets_[0]._forward_hooks


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"damping": 0.0}, "damping=0.0"),
        ({"damping": -1.0}, "damping=-1.0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"decay": 1.0}, "decay"),
        ({"n": 0}, "n=0"),
        ({"n_inverse": 0}, "n_inverse=0"),
        ({"kl": 0.0}, "kl=0.0"),
        ({"draws": 0}, "draws=0"),
        ({"fisher": "mc", "draws": None}, "exact"),
        ({"fisher": "exact", "labels": "data"}, "empirical"),
        ({"fisher": "full"}, "fisher='full'"),
        ({"labels": "own"}, "labels"),
        ({"likelihood": "poisson"}, "likelihood"),
        ({"sharing": "sum"}, "sharing"),
        ({"norms": "none"}, "norms"),
        ({"form": "none"}, "form"),
        ({"fisher": "ekfac", "form": "factored"}, "tikhonov"),
    ],
)
def test_wrong_arguments(wrong, match):
    with pytest.raises(ValueError, match=match):
        made(**wrong)


def test_a_wrong_group_is_refused_and_not_added():
    opt, model, data = made()
    with pytest.raises(ValueError, match="damping"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "damping": 0.0})
    assert len(opt.param_groups) == 1
    run(opt, model, data)
    opt.param_groups[0]["damping"] = 0.0
    untouched(opt, model, data, "damping")


@pytest.mark.parametrize("fisher", FISHERS)
def test_a_loss_that_is_not_finite(fisher):
    opt, model, data = made(fisher, n=1)
    run(opt, model, data)
    untouched(opt, model, (data[0] * float("nan"), data[1]), "nan")
    run(opt, model, data)


@pytest.mark.parametrize("fisher", FISHERS)
def test_a_factor_that_is_not_finite(fisher):
    """Gradients are finite, their squares are not."""
    model = nn.Linear(6, 3)
    nn.init.zeros_(model.weight)
    opt = NaturalGradient(model.parameters(), 0.1, fisher=fisher)
    untouched(opt, model, (torch.full((4, 6), 1e25), torch.tensor([0, 1, 2, 0])), "not finite")


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_a_singular_matrix_names_the_damping(fisher):
    opt, model, data = made(fisher, damping=1e-300)
    untouched(opt, model, data, "damping=1e-300")


def test_models_that_are_too_large_for_the_whole_matrix():
    model = nn.Linear(100, 60)
    opt = NaturalGradient(model.parameters(), 0.1, fisher="exact")
    untouched(opt, model, (torch.randn(4, 100), torch.randint(3, (4,))), "kfac")


def test_what_a_step_needs():
    opt, model, data = made()
    with pytest.raises(TypeError, match=r"steppe\.Batch"):
        opt.step(lambda: nets.losses(model, data).mean())
    with pytest.raises(TypeError, match=r"steppe\.Batch"):
        opt.step()
    other, _ = nets.mlp(1)
    with pytest.raises(ValueError, match="6 of the 6"):
        run(opt, other, data)


def test_outputs_that_labels_cannot_be_drawn_from():
    def twice(model, batch):
        return nets.losses(model, batch) + nets.losses(model, batch)

    opt, model, data = made()
    untouched(opt, model, data, "2 times", twice)
    flat = nn.Sequential(nn.Linear(6, 3), nn.Unflatten(1, (3, 1))).double()
    opt = NaturalGradient(flat.parameters(), 0.1)
    untouched(opt, flat, data, r"logits \(B, C\)", lambda m, b: nets.losses(lambda x: m(x)[:, :, 0], b))
    opt = NaturalGradient(flat.parameters(), 0.1, labels="data")
    opt.step(steppe.Batch(flat, lambda m, b: nets.losses(lambda x: m(x)[:, :, 0], b), data))


def test_outputs_beside_those_of_the_loss():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(6, 5).double(), nn.Linear(5, 3).double()

        def forward(self, x):
            h = torch.tanh(self.first(x))
            return {"hidden": h, "logits": self.head(h)}

    model = Hidden()
    _, data = nets.mlp()
    opt = NaturalGradient(model.parameters(), 0.1, damping=0.1)
    opt.step(steppe.Batch(model, lambda m, b: nets.losses(lambda x: m(x)["logits"], b), data))
    assert opt.steps == 1


@pytest.mark.parametrize(
    ("fisher", "how", "expected"),
    [
        ("exact", {}, 1 + (1 + 4 / 3 * 155) / 2),
        ("diagonal", {"draws": 3}, 1 + 3 * 2 / 3 / 2),
        ("kfac", {}, 1 + 1 / 3 / 2),
        ("ekfac", {"draws": 2}, 1 + 2 / 3 / 2),
        ("kfac", {"labels": "data", "draws": 5}, 1 + 1 / 3 / 2),
    ],
)
def test_cost_is_what_is_counted(fisher, how, expected):
    opt, model, data = made(fisher, **how)
    assert opt.cost() == pytest.approx(expected)
    run(opt, model, data)
    assert opt.cost() == pytest.approx(expected)
