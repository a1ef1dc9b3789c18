"""ESAM's linearity, and its cosines of gradients, against plain formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import nets
from quadratics import normal, quadratic, symmetric
from steppe.curvature.cosines import cosines
from steppe.curvature.linearity import linearity
from steppe.curvature.objective import Objective

N = 30
SPECTRUM = torch.linspace(-1, 4, N, dtype=torch.float64)


def weigh(batch: nets.Data) -> Tensor:
    return batch[0][:, 0].abs()


def uneven(**how) -> Objective:
    model, (x, y) = nets.mlp()
    return Objective(model, nets.losses, [(x[:7], y[:7]), (x[7:], y[7:])], **how)


def test_on_a_quadratic_it_is_the_second_order_term():
    centres = [normal(5, N, seed=2), normal(2, N, seed=3)]
    objective = quadratic(SPECTRUM, normal(N), centres)
    matrix, _ = symmetric(SPECTRUM)
    values = []
    for c in centres:
        g = matrix @ (normal(N) - c.mean(0))
        values.append(abs(0.01 * float(g @ matrix @ g / (2 * g @ g))))
    found = linearity(objective, 0.1)
    assert found.values.tolist() == pytest.approx(values, rel=1e-9)
    assert found.zeta == pytest.approx((5 * values[0] + 2 * values[1]) / 7, rel=1e-9)
    assert found.passes == pytest.approx(4 / 3)


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(normal(N))

    def forward(self, x: Tensor) -> Tensor:
        return 3 + x @ self.w


def test_an_affine_loss_is_linear():
    objective = Objective(Affine(), lambda model, x: model(x), [normal(4, N, seed=2), normal(3, N, seed=3)])
    assert linearity(objective, 0.5).values.tolist() == pytest.approx([0, 0], abs=1e-13)


def test_no_radius_is_linear():
    assert linearity(uneven(), 0.0).values.tolist() == [0, 0]


def grads(model: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def moved(model: nn.Module, epsilon: Tensor) -> None:
    sizes = [p.numel() for p in model.parameters()]
    with torch.no_grad():
        for p, e in zip(model.parameters(), epsilon.split(sizes), strict=True):
            p += e.view(p.shape)


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_linearity_against_a_plain_loop(beta):
    objective, rho = uneven(weights=weigh), 0.2
    values = []
    for i, batch in enumerate(objective.loader):
        model, _ = nets.mlp()
        a = weigh(batch) / weigh(batch).sum()
        before = a @ nets.losses(model, batch)
        g = grads(model, before)
        draws = torch.rand(6, generator=objective.generator(3, f"swp 0 {i}"))
        mask = torch.cat(
            [torch.full((p.numel(),), float(d < beta)) for p, d in zip(model.parameters(), draws, strict=True)]
        )
        epsilon = rho / beta * (mask * g) / (mask * g).norm()
        assert 0 < mask.sum() < len(mask) or beta == 1
        moved(model, epsilon)
        values.append(abs((a @ nets.losses(model, batch) - before - epsilon @ g).item()))
    found = linearity(objective, rho, beta=beta, seed=3)
    assert found.values.tolist() == pytest.approx(values, rel=1e-9)


@pytest.mark.parametrize("gamma", [0.5, 0.3])
def test_cosines_against_a_plain_loop(gamma):
    objective, rho = uneven(weights=weigh), 0.2
    rows, weights = [], []
    for i, batch in enumerate(objective.loader):
        model, _ = nets.mlp()
        x, y = batch
        a = weigh(batch)
        before = nets.losses(model, batch)
        g = grads(model, a @ before / a.sum())
        moved(model, rho * g / g.norm())
        after = nets.losses(model, batch)
        order, count = (before - after).argsort(), int(gamma * len(x))
        drawn = torch.randperm(len(x), generator=objective.generator(5, f"subset 0 {i}"))[:count]
        whole = grads(model, a @ nets.losses(model, batch))
        row = []
        for rows_ in (order[:count], order[-count:], drawn):
            part = grads(model, a[rows_] @ nets.losses(model, (x[rows_], y[rows_])))
            row.append(float(part @ whole / (part.norm() * whole.norm())))
        rows.append(row)
        weights.append(float(a.sum()))
    found = cosines(objective, rho, gamma=gamma, seed=5)
    assert found.values.tolist() == [pytest.approx(row, rel=1e-10) for row in rows]
    means = [sum(w * row[k] for w, row in zip(weights, rows, strict=True)) / sum(weights) for k in range(3)]
    assert [found.sharpest, found.flattest, found.random] == pytest.approx(means, rel=1e-10)
    count = sum(int(gamma * len(x)) for x, _ in objective.loader)
    assert found.passes == pytest.approx(2 + 3 * count / 12)


def test_parts_of_a_batch_whose_examples_are_alike_have_its_gradient():
    model, (x, y) = nets.mlp()
    objective = Objective(model, nets.losses, [(x[:1].expand(6, -1), y[:1].expand(6))])
    assert cosines(objective).values.tolist() == [pytest.approx([1, 1, 1], rel=1e-12)]


def test_a_batch_too_small_for_a_subset_is_left_out():
    model, (x, y) = nets.mlp()
    both = Objective(model, nets.losses, [(x[:6], y[:6]), (x[6:7], y[6:7])])
    one = Objective(model, nets.losses, [(x[:6], y[:6])])
    assert cosines(both).values.tolist() == cosines(one).values.tolist()
    with pytest.raises(ValueError, match=r"gamma=0\.5 of a batch is less than one example in every batch"):
        cosines(Objective(model, nets.losses, [(x[:1], y[:1])]))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda o: linearity(o, -1.0), "rho=-1.0"),
        (lambda o: linearity(o, beta=0.0), r"beta=0.0 must lie in \(0, 1\]"),
        (lambda o: cosines(o, 0.0), "rho=0.0 must be a finite number > 0"),
        (lambda o: cosines(o, gamma=0.6), r"gamma=0.6 must lie in \(0, 0.5\]"),
    ],
)
def test_arguments_that_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call(uneven())


def test_cosines_need_the_loss_of_each_example():
    objective = uneven()
    mean = Objective(objective.model, lambda model, batch: nets.losses(model, batch).mean(), objective.loader)
    with pytest.raises(TypeError, match="loss_fn returned a mean"):
        cosines(mean)
    assert linearity(mean).zeta == pytest.approx(linearity(objective).zeta, rel=1e-10)
