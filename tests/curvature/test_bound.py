"""The PAC-Bayes bound against its formula, with figures worked out apart."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import nets
from quadratics import normal
from steppe.curvature.bound import pac_bayes
from steppe.curvature.objective import Objective
from steppe.curvature.sharpness import surrogate_gap


def test_a_network_of_more_weights_than_examples_has_a_vacuous_bound():
    model, (x, y) = nets.mlp()
    objective = Objective(model, nets.losses, [(x[:5], y[:5]), (x[5:], y[5:])])
    found = pac_bayes(objective, 0.1, delta=0.01)
    gap = surrogate_gap(objective, 0.1)
    w = torch.cat([p.flatten() for p in model.parameters()])
    n, k = 12, len(w)
    inner = 1 + (w @ w).item() / 0.1**2 * (1 + math.sqrt(math.log(n) / k)) ** 2
    root = math.sqrt((k * math.log(inner) + 4 * math.log(n / 0.01) + 8 * math.log(6 * n + 3 * k)) / (n - 1))
    assert (found.examples, found.parameters) == (n, k)
    assert found.perturbed == pytest.approx(gap.loss + gap.gap, rel=1e-13)
    assert found.complexity == pytest.approx(root, rel=1e-12)
    assert found.bound == found.perturbed + found.complexity
    assert found.vacuous
    assert found.passes == pytest.approx(5 / 3)


class Coin(nn.Module):
    """One weight: the logit of a class."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.w * x).sigmoid()


def test_one_weight_and_many_examples_have_a_bound_that_says_something():
    data = [normal(20000, seed=1).abs()]
    objective = Objective(Coin(), lambda model, x: 1 - model(x), data)
    found = pac_bayes(objective, 0.5)
    n = 20000  # k = 1, ‖w‖²/ρ² = 1, (1 + √log n)² = 17.1975…
    spread = math.log(1 + (1 + math.sqrt(math.log(n))) ** 2)
    assert found.complexity == pytest.approx(
        math.sqrt((spread + 4 * math.log(n / 0.05) + 8 * math.log(120003)) / 19999)
    )
    assert not found.vacuous
    assert 0.4 < found.bound < 0.6


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"rho": 0.0}, "rho=0.0 must be a finite number > 0"),
        ({"delta": 0.0}, r"delta=0.0 must lie in \(0, 1\)"),
        ({"delta": 1.0}, r"delta=1.0 must lie in \(0, 1\)"),
    ],
)
def test_arguments_that_are_refused(how, match):
    model, batch = nets.mlp()
    with pytest.raises(ValueError, match=match):
        pac_bayes(Objective(model, nets.losses, [batch]), **how)


def test_data_that_are_refused():
    model, (x, y) = nets.mlp()
    with pytest.raises(ValueError, match="without weights"):
        pac_bayes(Objective(model, nets.losses, [(x, y)], weights=lambda batch: torch.ones(12)))
    with pytest.raises(ValueError, match="at least 2 examples"):
        pac_bayes(Objective(model, nets.losses, [(x[:1], y[:1])]))
