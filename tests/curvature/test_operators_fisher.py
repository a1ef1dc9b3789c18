"""Fisher matrices: softmax regression and Martens' example in closed form, and what drawing labels costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from exact import dense, gap, gauss_newton, losses, made, operator, probes, rows, small, squares, uneven

BATCHES = uneven(4)
LINEAR = "hessian", "ggn", "fisher"


def regression() -> nn.Module:
    """Softmax regression on 4 numbers."""
    return made(lambda: nn.Linear(4, 3))


def analytic(model: nn.Module) -> torch.Tensor:
    """``E[(diag(p) − p pᵀ) ⊗ x̃ x̃ᵀ]``, x̃ with a 1 for the bias, in the order weight, bias."""
    x = torch.cat([x for x, _ in BATCHES])
    p = model(x).detach().softmax(1)
    S = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    weight = torch.einsum("ncd,ni,nj->cidj", S, x, x).reshape(12, 12)
    cross = torch.einsum("ncd,ni->cid", S, x).reshape(12, 3)
    return torch.cat([torch.cat([weight, cross], 1), torch.cat([cross.T, S.sum(0)], 1)]) / len(x)


@pytest.mark.parametrize("kind", LINEAR)
def test_softmax_regression(kind):
    model = regression()
    assert gap(dense(operator(model, losses, BATCHES, kind)), analytic(model)) < 1e-12


def test_monte_carlo_error_falls_as_the_root_of_the_draws():
    model = regression()
    batch = [tuple(torch.cat(both) for both in zip(*BATCHES, strict=True))]
    exact, counts, seeds = analytic(model), [1, 4, 16, 64], range(30)
    errors = [
        [gap(dense(operator(model, losses, batch, "fisher", draws=n, seed=seed)), exact) ** 2 for seed in seeds]
        for n in counts
    ]
    slope = np.polyfit(np.log(counts), 0.5 * np.log(np.mean(errors, 1)), 1)[0]
    assert abs(slope + 0.5) < 0.1


def smoothed(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none", label_smoothing=0.1)


def weighted(model: nn.Module, batch: Any) -> torch.Tensor:
    weight = torch.tensor([0.0, 1.0, 50.0]).to(batch[0])
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none", weight=weight)


def mean(model: nn.Module, batch: Any) -> torch.Tensor:
    return losses(model, batch).mean()


def mixed(model: nn.Module, batch: Any) -> torch.Tensor:
    x, y = batch
    soft = F.one_hot(y, 3).to(x)
    return F.cross_entropy(model(x), 0.7 * soft + 0.3 * soft.flip(0), reduction="none")


def of_log_probabilities(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.nll_loss(model(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1, 3, 10, 30, 100, 1e4])
@pytest.mark.parametrize("loss_fn", [losses, smoothed, weighted, mean, mixed, of_log_probabilities])
def test_a_cross_entropy_is_known_by_its_curvature(loss_fn, scale, dtype):
    model = regression().to(dtype)
    with torch.no_grad():
        model.weight *= scale
    if loss_fn is of_log_probabilities:
        model = nn.Sequential(model, nn.LogSoftmax(1))
    batches = [(x.to(dtype), y) for x, y in BATCHES]
    v = torch.ones(15, dtype=dtype)
    known = operator(model, loss_fn, batches, "fisher")
    assert torch.equal(known @ v, operator(model, loss_fn, batches, "fisher", likelihood="categorical") @ v)


def to_one_hot(model: nn.Module, batch: Any) -> torch.Tensor:
    z = model(batch[0])
    return (z - F.one_hot(batch[1], z.shape[1]).to(z)).square().mean(1)


def of_many_labels(model: nn.Module, batch: Any) -> torch.Tensor:
    z = model(batch[0])
    target = F.one_hot(batch[1], 100)[:, : z.shape[1]].to(z)
    return F.binary_cross_entropy_with_logits(z, target, reduction="none").mean(1)


def of_probabilities(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.nll_loss(model(batch[0]).sigmoid().log(), batch[1].clamp_max(0), reduction="none")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("outputs", [1, 3, 100])
@pytest.mark.parametrize("loss_fn", [to_one_hot, of_many_labels, of_probabilities])
def test_another_loss_needs_its_likelihood(loss_fn, outputs, dtype):
    model = made(lambda: nn.Linear(4, outputs)).to(dtype)
    batches = [(x.to(dtype), y.clamp_max(outputs - 1)) for x, y in BATCHES]
    v = torch.ones(5 * outputs, dtype=dtype)
    for draws in (None, 2):
        with pytest.raises(ValueError, match=r"not the cross-entropy.*likelihood=\"gaussian\".*kind=\"ggn\""):
            operator(model, loss_fn, batches, "fisher", draws=draws) @ v
        for likelihood in ("categorical", "gaussian"):
            assert (
                (operator(model, loss_fn, batches, "fisher", draws=draws, likelihood=likelihood) @ v).isfinite().all()
            )


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_monte_carlo_is_unbiased(likelihood):
    model, v = small(), probes(43, 1)[:, 0]
    batches = BATCHES if likelihood == "categorical" else [(x, x[:, :3]) for x, _ in BATCHES]
    loss_fn = losses if likelihood == "categorical" else squares
    exact = operator(model, loss_fn, batches, "fisher", likelihood=likelihood) @ v
    drawn = torch.stack(
        [operator(model, loss_fn, batches, "fisher", likelihood=likelihood, draws=4, seed=s) @ v for s in range(100)]
    )
    z = (drawn.mean(0) - exact) / (drawn.std(0) / 100**0.5)
    assert float(z.abs().max()) < 4
    assert float(z.square().mean()) < 2


def test_draws_are_a_function_of_the_seed():
    def drawn(**kwargs):
        return dense(operator(small(), losses, BATCHES, "fisher", draws=2, **kwargs))

    first = drawn(seed=0)
    torch.rand(7)
    assert torch.equal(drawn(seed=0), first)
    assert not torch.allclose(drawn(seed=1), first)
    assert torch.equal(drawn(seed=0, reuse=True), first)
    A = operator(small(), losses, BATCHES, "fisher", draws=2)
    assert torch.equal(dense(A), dense(A))
    assert gap(first, first.T) < 1e-13
    assert float(torch.linalg.eigvalsh(first)[0]) > -1e-13


def test_batches_draw_labels_of_their_own():
    twice = [BATCHES[0], BATCHES[0]]
    one = dense(operator(small(), losses, BATCHES[:1], "fisher", draws=1))
    assert gap(dense(operator(small(), losses, twice, "fisher", draws=1)), one) > 1e-2


def test_the_labels_of_the_data_take_no_part():
    other = [(x, (y + 1) % 3) for x, y in BATCHES]
    for how in ({}, {"draws": 3}):
        a, b = (dense(operator(small(), losses, batches, "fisher", **how)) for batches in (BATCHES, other))
        assert torch.equal(a, b)
    assert gap(*(dense(operator(small(), losses, batches, "empirical")) for batches in (BATCHES, other))) > 1e-2


def test_gauss_newton_is_the_fisher_of_cross_entropy():
    model = small()
    fisher = dense(operator(model, losses, BATCHES, "fisher"))
    assert gap(dense(operator(model, losses, BATCHES, "ggn")), fisher) < 1e-12
    assert gap(fisher, gauss_newton(model, BATCHES, F.cross_entropy)) < 1e-12


def test_the_mean_of_many_draws():
    """Of 50,000 equal examples, to a percent."""
    model = small()
    one = [(BATCHES[0][0][:1], BATCHES[0][1][:1])]
    many = [tuple(each.expand(50000, *each.shape[1:]) for each in one[0])]
    exact = dense(operator(model, losses, one, "fisher"))
    assert gap(dense(operator(model, losses, many, "fisher", draws=2, params=model[2])), exact[25:, 25:]) < 0.01


class Mean(nn.Module):
    """Martens' example: data from N(θ, 1), whatever comes in."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.theta.expand(len(x))


def half_square(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (model(x) - x).square()


@pytest.mark.parametrize("theta", [0.1, 1.0, 5.0])
def test_martens_example(theta):
    """All data are 0: the Fisher matrix is 1 wherever θ is, the empirical one θ²."""
    zeros = [torch.zeros(5, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]

    def value(kind, **kwargs):
        return float(dense(operator(Mean(theta), half_square, zeros, kind, **kwargs)))

    for kind, kwargs in (("fisher", {"likelihood": "gaussian"}), ("ggn", {}), ("hessian", {})):
        assert abs(value(kind, **kwargs) - 1) < 1e-12
    assert abs(value("empirical") - theta**2) < 1e-12 * theta**2
    zeros = [torch.zeros(50000, dtype=torch.float64)] * 2
    drawn = value("fisher", likelihood="gaussian", draws=2)
    assert abs(drawn - 1) < 4 * (2 / 200000) ** 0.5  # the mean of 200,000 squares of normal numbers


@pytest.mark.parametrize("draws", [None, 2000])
def test_gaussian_outputs_of_any_shape(draws):
    """Means (B, 2, 2): the Fisher matrix is JᵀJ."""
    model = made(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Unflatten(1, (2, 2))))
    batches = [(x, x.view(-1, 2, 2)) for x, _ in BATCHES]
    J = rows(torch.cat([model(x) for x, _ in batches]).reshape(-1), list(model.parameters()))
    found = dense(operator(model, squares, batches, "fisher", likelihood="gaussian", draws=draws))
    assert gap(found, J.T @ J / 8) < (1e-12 if draws is None else 0.05)
