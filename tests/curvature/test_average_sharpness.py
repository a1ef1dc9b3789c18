"""The expected rise of the loss under noise on the weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import nets
from quadratics import normal, quadratic, symmetric
from steppe import vec
from steppe.curvature.average import average_sharpness
from steppe.curvature.objective import Objective

N = 30
SPECTRUM = torch.linspace(-1, 4, N, dtype=torch.float64)


def test_each_draw_is_the_quadratic_form_of_its_noise():
    objective = quadratic(SPECTRUM, normal(N), [normal(3, N, seed=2), normal(2, N, seed=3)])
    matrix, _ = symmetric(SPECTRUM)
    found = average_sharpness(objective, "gaussian", 0.3, draws=6, seed=7)
    for draw, value in enumerate(found.values.tolist()):
        e = torch.randn(N, dtype=torch.float64, generator=objective.generator(7, f"noise {draw}"))
        assert value == pytest.approx(float(0.09 * (e @ matrix @ e) / 2), rel=1e-9)
    assert found.sharpness == pytest.approx(float(found.values.mean()))
    assert found.error == pytest.approx(float(found.values.std()) / 6**0.5)
    assert found.passes == pytest.approx(1 / 3 + 6 * 2 / 3)


def test_on_average_it_is_half_the_trace():
    objective = quadratic(SPECTRUM, normal(N), [normal(3, N, seed=2)])
    found = average_sharpness(objective, "gaussian", 0.1, draws=400)
    exact = 0.01 * float(SPECTRUM.sum()) / 2
    assert abs(found.sharpness - exact) / found.error < 4
    assert found.error < exact / 10


class Linear(nn.Module):
    """A loss that is linear in the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(normal(N))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w


@pytest.mark.parametrize("noise", ["gaussian", "filter"])
def test_a_linear_loss_has_none(noise):
    objective = Objective(Linear(), lambda model, batch: model(batch), [normal(4, N, seed=2)])
    assert average_sharpness(objective, noise, 0.5).values.tolist() == pytest.approx([0] * 10, abs=1e-13)


def test_noise_is_as_large_as_the_filters_and_independent_entry_by_entry():
    model, _ = nets.mlp()
    w = [p.detach().clone() for p in model.parameters()]
    seen: list[list[torch.Tensor]] = []

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        seen.append([p.detach() - start for p, start in zip(model.parameters(), w, strict=True)])
        return model(batch).square().sum(1)

    objective = Objective(model, loss, [normal(2, 6)])
    average_sharpness(objective, "filter", 0.01, draws=400)
    first, *moved = seen
    assert all(not each.any() for each in first)
    assert len(moved) == 800
    for i, norm in enumerate(vec.filter_norms(w)):
        plus = torch.stack([draw[i] / (0.01 * norm) for draw in moved[::2]])
        minus = torch.stack([draw[i] / (0.01 * norm) for draw in moved[1::2]])
        assert torch.allclose(plus, -minus, atol=1e-12)
        count = plus.numel()
        assert abs(float(plus.mean())) < 4 / count**0.5
        assert abs(float(plus.square().mean()) - 1) < 4 * (2 / count) ** 0.5
        assert torch.allclose(plus.square().mean(0), torch.ones_like(plus[0]), atol=6 * (2 / 400) ** 0.5)


def test_filter_noise_does_not_see_a_rescaling_that_changes_nothing():
    """A ReLU net with its first layer times 100 and its second over 100 is the same function."""
    _, (x, y) = nets.mlp()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3, bias=False)).double()
    objective = Objective(net, nets.losses, [(x, y)])
    before = {noise: average_sharpness(objective, noise, 0.05) for noise in ("filter", "gaussian")}
    with torch.no_grad():
        net[0].weight *= 100
        net[0].bias *= 100
        net[2].weight /= 100
    after = {noise: average_sharpness(objective, noise, 0.05) for noise in ("filter", "gaussian")}
    assert after["filter"].values.tolist() == pytest.approx(before["filter"].values.tolist(), rel=1e-10)
    assert after["filter"].sharpness == pytest.approx(before["filter"].sharpness, rel=1e-10)
    assert after["gaussian"].sharpness > 10 * before["gaussian"].sharpness


def test_seed_and_deviation():
    model, batch = nets.mlp()
    objective = Objective(model, nets.losses, [batch])
    values = [average_sharpness(objective, deviation=0.1, seed=seed, draws=3).values.tolist() for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]
    nothing = average_sharpness(objective, deviation=0.0, draws=1)
    assert nothing.sharpness == 0
    assert math.isnan(nothing.error)


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"deviation": -1.0}, "deviation=-1.0 must be a finite number ≥ 0"),
        ({"draws": 0}, "draws=0 must be a whole number ≥ 1"),
        ({"noise": "uniform"}, "noise='uniform' must be 'gaussian' or 'filter'"),
    ],
)
def test_arguments_that_are_refused(how, match):
    model, batch = nets.mlp()
    with pytest.raises(ValueError, match=match):
        average_sharpness(Objective(model, nets.losses, [batch]), **how)
