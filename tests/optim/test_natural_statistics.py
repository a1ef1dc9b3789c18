"""Drawn labels: unbiased, and better with the root of their number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import nets
import steppe
from reference.natural import dense_fisher, scores
from steppe.optim import NaturalGradient


def problem():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
        return model, (torch.randn(6, 3, dtype=torch.float64), torch.randint(3, (6,)))


def estimates(name: str, count: int, **how) -> torch.Tensor:
    """What a first step sees, for many seeds: the diagonal or the matrix, as one flat vector each."""
    found = []
    for seed in range(count):
        model, data = problem()
        opt = NaturalGradient(model.parameters(), 0.0, seed=seed, **how)
        opt.step(steppe.Batch(model, nets.losses, data))
        found.append(torch.cat([kept[name].reshape(-1) for kept in opt.state.values() if name in kept]))
    return torch.stack(found)


def exact(likelihood: str = "categorical") -> torch.Tensor:
    model, (x, _) = problem()
    return dense_fisher(list(model.parameters()), scores(model, x, likelihood))


@pytest.mark.parametrize("draws", [1, 4])
def test_the_diagonal_is_unbiased(draws):
    found = estimates("diagonal", 200, fisher="diagonal", draws=draws)
    z = (found.mean(0) - exact().diag()) / (found.std(0) / math.sqrt(len(found)))
    assert float(z.abs().max()) < 4


def test_with_the_labels_of_the_data_it_is_biased():
    """B times the square of the mean gradient, which is no mean of squares."""
    model, (x, y) = problem()
    data = estimates("diagonal", 1, fisher="diagonal", labels="data")[0]
    g = torch.autograd.grad(nets.losses(model, (x, y)).mean(), list(model.parameters()))
    torch.testing.assert_close(data, len(x) * torch.cat([t.reshape(-1) ** 2 for t in g]), rtol=1e-12, atol=0)
    assert float((data - exact().diag()).norm() / exact().diag().norm()) > 0.3


def test_expected_labels_leave_no_noise():
    first, second = estimates("diagonal", 2, fisher="diagonal", draws=None)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, exact().diag(), rtol=1e-12, atol=1e-15)


def test_drawn_matrices_fall_with_the_root_of_the_draws():
    errors = []
    for draws in (4, 64):
        found = estimates("fisher", 12, fisher="mc", draws=draws)
        errors.append(float((found - exact().reshape(-1)).square().sum(1).mean().sqrt()))
    assert 0.7 < errors[0] / errors[1] / 4 < 1.4


@pytest.mark.parametrize("fisher", ["exact", "empirical", "diagonal", "kfac", "ekfac"])
def test_micro_batches_of_expected_labels_are_one_batch(fisher):
    ends = []
    for micro in (1, 4):
        model, data = problem()
        opt = NaturalGradient(model.parameters(), 0.1, fisher=fisher, draws=None, damping=0.1, n=2, n_inverse=4)
        for _ in range(6):
            opt.step(steppe.Batch(model, nets.losses, data, micro=micro))
        ends.append(list(model.parameters()))
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10)
