"""Surrogate gap and m-sharpness, against exact maxima on quadratics and plain formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nets
from quadratics import normal, quadratic, symmetric, trust_region
from steppe.curvature.objective import Objective
from steppe.curvature.part import estimate
from steppe.curvature.sharpness import m_sharpness, surrogate_gap

N = 30
CONVEX = torch.linspace(0.1, 4, N, dtype=torch.float64)
SADDLE = torch.linspace(-3, 4, N, dtype=torch.float64)
STEEP = torch.linspace(-4, 2, N, dtype=torch.float64)


@pytest.mark.parametrize(
    ("spectrum", "rho"),
    [(CONVEX, 0.05), (CONVEX, 0.5), (CONVEX, 2.0), (SADDLE, 0.05), (SADDLE, 0.5), (SADDLE, 2.0), (STEEP, 20.0)],
)
def test_ascent_converges_to_the_exact_trust_region_maximum(spectrum, rho):
    centres = normal(6, N, seed=2)
    objective = quadratic(spectrum, normal(N), [centres])
    matrix, _ = symmetric(spectrum)
    exact = trust_region(matrix, matrix @ (normal(N) - centres.mean(0)), rho)
    found = m_sharpness(objective, rho, 6, steps=300)
    assert found.sharpness == pytest.approx(exact, rel=1e-6)
    assert surrogate_gap(objective, rho, steps=300).gap == pytest.approx(exact, rel=1e-6)


def test_every_group_has_its_own_maximum():
    batches = [normal(5, N, seed=2), normal(4, N, seed=3)]
    matrix, _ = symmetric(CONVEX)
    groups = [batches[0][:2], batches[0][2:4], batches[0][4:], batches[1][:2], batches[1][2:]]
    exact = [trust_region(matrix, matrix @ (normal(N) - group.mean(0)), 0.5) for group in groups]
    found = m_sharpness(quadratic(CONVEX, normal(N), batches), 0.5, 2, steps=100)
    assert found.values.tolist() == pytest.approx(exact, rel=1e-6)
    sizes = torch.tensor([2, 2, 1, 2, 2], dtype=torch.float64)
    mean = float((torch.tensor(exact) * sizes).sum() / 9)
    assert found.sharpness == pytest.approx(mean, rel=1e-6)


def test_one_step_is_sams_ascent():
    """On a quadratic ``h = ρ‖g‖ + ½ρ² ĝᵀHĝ``."""
    centres, rho = [normal(5, N, seed=2), normal(2, N, seed=3)], 0.3
    objective = quadratic(CONVEX, normal(N), centres)
    matrix, _ = symmetric(CONVEX)
    g = matrix @ (normal(N) - torch.cat(centres).mean(0))
    unit = g / g.norm()
    along = float(unit @ matrix @ unit)
    found = surrogate_gap(objective, rho)
    assert found.gap == pytest.approx(float(rho * g.norm()) + rho**2 * along / 2, rel=1e-12)
    assert found.slope == pytest.approx(rho * float(g.norm()), rel=1e-12)
    assert found.curvature == pytest.approx(along, rel=1e-10)
    assert found.sharpness == 2 * found.gap / rho**2
    each = [matrix @ (normal(N) - c.mean(0)) for c in centres]
    values = [float(rho * g.norm() + rho**2 * (g @ matrix @ g) / (2 * g @ g)) for g in each]
    assert m_sharpness(objective, rho, 5).values.tolist() == pytest.approx(values, rel=1e-12)


@pytest.mark.parametrize("steps", [1, 60])
def test_twice_the_gap_over_rho_squared_is_the_largest_eigenvalue(steps):
    """At a minimum slightly displaced: at random, or along the worst direction where there is one step only."""
    spectrum = torch.cat([torch.linspace(0, 2, 299, dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64)])
    _, q = symmetric(spectrum)
    centres = normal(4, 300, seed=2)
    away = q[:, -1] if steps == 1 else normal(300) / 300**0.5
    objective = quadratic(spectrum, centres.mean(0) + 1e-6 * away, [centres])
    found = surrogate_gap(objective, 0.05, steps=steps)
    assert found.sharpness == pytest.approx(3.0, rel=1e-3)
    assert found.curvature == pytest.approx(3.0, rel=1e-3)
    assert found.passes == pytest.approx(steps + 2 / 3)


def uneven(**how) -> Objective:
    model, (x, y) = nets.mlp()
    return Objective(model, nets.losses, [(x[:5], y[:5]), (x[5:8], y[5:8]), (x[8:], y[8:])], **how)


def weigh(batch) -> torch.Tensor:
    return batch[0][:, 0].abs()


@pytest.mark.parametrize("weights", [None, weigh])
def test_gap_of_uneven_batches_is_that_of_the_whole(weights):
    objective, rho = uneven(weights=weights), 0.1
    model, (x, y) = nets.mlp()
    a = torch.ones(len(x), dtype=torch.float64) if weights is None else weigh((x, y))

    def whole() -> torch.Tensor:
        return (a * nets.losses(model, (x, y))).sum() / a.sum()

    before = whole()
    g = torch.autograd.grad(before, list(model.parameters()))
    norm = torch.cat([each.flatten() for each in g]).norm()
    with torch.no_grad():
        for p, each in zip(model.parameters(), g, strict=True):
            p += rho * each / norm
    found = surrogate_gap(objective, rho)
    assert found.loss == pytest.approx(before.item(), rel=1e-13)
    assert found.gap == pytest.approx((whole() - before).item(), rel=1e-11)


@pytest.mark.parametrize("m", [1, 2, 3])
def test_m_sharpness_against_plain_loops(m):
    objective, rho = uneven(weights=weigh), 0.1
    values, weights = [], []
    for x, y in objective.loader:
        for i in range(0, len(x), m):
            model, _ = nets.mlp()
            batch = x[i : i + m], y[i : i + m]
            a = weigh(batch) / weigh(batch).sum()
            before = a @ nets.losses(model, batch)
            before.backward()
            norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
            with torch.no_grad():
                for p in model.parameters():
                    p += rho * p.grad / norm
                values.append(float(a @ nets.losses(model, batch) - before))
            weights.append(float(weigh(batch).sum()))
    found = m_sharpness(objective, rho, m)
    v, a = torch.tensor(values, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
    mean = (a * v).sum() / a.sum()
    g = len(v)
    error = ((a * (v - mean)).square().sum() * g / (g - 1)).sqrt() / a.sum()
    assert found.values.tolist() == pytest.approx(values, rel=1e-10)
    assert found.sharpness == pytest.approx(float(mean), rel=1e-12)
    assert found.error == pytest.approx(float(error), rel=1e-9)
    assert found.passes == pytest.approx(4 / 3)


def test_standard_error_of_equal_weights_is_the_usual_one():
    values = normal(20)
    mean, error = estimate(values, torch.full((20,), 3.0, dtype=torch.float64))
    assert float(mean) == pytest.approx(float(values.mean()))
    assert float(error) == pytest.approx(float(values.std()) / 20**0.5)
    assert math.isnan(estimate(values[:1], torch.ones(1))[1])
    with pytest.raises(ValueError, match="weights of all examples are 0"):
        estimate(values, torch.zeros(20))


def test_more_steps_never_give_less():
    found = [m_sharpness(uneven(), 0.5, 4, steps=steps).sharpness for steps in (1, 2, 3, 5, 10)]
    assert found == sorted(found)
    assert found[-1] > found[0]


def test_more_steps_never_give_less_where_they_overshoot():
    """The maximum lies inside of the ball."""
    spectrum = torch.linspace(-4, -1, N, dtype=torch.float64)
    objective = quadratic(spectrum, normal(N), [normal(N)[None] + 0.05 * normal(1, N, seed=2)])
    found = [m_sharpness(objective, 0.5, 1, steps=steps).sharpness for steps in range(1, 12)]
    assert found == sorted(found)


def test_no_radius_no_rise():
    assert m_sharpness(uneven(), 0.0, 2, steps=3).values.tolist() == [0.0] * 7
    found = surrogate_gap(uneven(), 0.0)
    assert found.gap == 0
    assert math.isnan(found.sharpness)
    assert math.isnan(found.curvature)


def test_a_group_of_weight_0_does_not_count():
    objective = uneven(
        weights=lambda batch: torch.zeros(len(batch[0])) if len(batch[0]) == 3 else torch.ones(len(batch[0]))
    )
    found = m_sharpness(objective, 0.1, 4)
    values = m_sharpness(uneven(), 0.1, 4).values
    assert found.sharpness == pytest.approx(
        float(values[[0, 1, 3]] @ torch.tensor([4.0, 1, 4]).double()) / 9, rel=1e-12
    )


def test_in_train_mode_every_pass_of_a_group_draws_the_same_masks():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    _, (x, y) = nets.mlp()
    loader = [(x[:4], y[:4]), (x[4:8], y[4:8])]
    objective = Objective(model, nets.losses, loader, mode="train")
    assert m_sharpness(objective, 0.0, 2, steps=3).values.tolist() == [0.0] * 4
    assert surrogate_gap(objective, 0.0, steps=3).gap == 0
    assert m_sharpness(objective, 0.1, 2).sharpness != m_sharpness(uneven(), 0.1, 2).sharpness


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda o: surrogate_gap(o, -0.1), r"rho=-0.1 must be a finite number ≥ 0"),
        (lambda o: surrogate_gap(o, math.nan), "rho=nan"),
        (lambda o: surrogate_gap(o, steps=0), "steps=0 must be a whole number ≥ 1"),
        (lambda o: m_sharpness(o, -1, 2), "rho=-1"),
        (lambda o: m_sharpness(o, 0.1, 0), "m=0 must be a whole number ≥ 1"),
        (lambda o: m_sharpness(o, 0.1, 2.5), "m=2.5"),
        (lambda o: m_sharpness(o, 0.1, 2, steps=0), "steps=0"),
        (lambda o: m_sharpness(o, 0.1, 6), "m=6 is more than a batch of the loader holds, 5"),
    ],
)
def test_arguments_that_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call(uneven())


def test_a_loss_that_is_infinite_at_the_perturbed_weights_names_the_radius():
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 1.0)
    data = [(torch.ones(2, 1, dtype=torch.float64), torch.zeros(2))]

    def loss(model: nn.Module, batch) -> torch.Tensor:
        return -(2 - model(batch[0]))[:, 0].log()

    objective = Objective(model, loss, data)
    assert surrogate_gap(objective, 0.5).gap == pytest.approx(math.log(2))
    for call in (lambda: surrogate_gap(objective, 1.5), lambda: m_sharpness(objective, 1.5, 2)):
        with pytest.raises(ValueError, match=r"the loss is nan at w \+ ε.*make rho=1.5 smaller"):
            call()
    assert model.weight.item() == 1.0


def test_mean_losses_do_for_whole_groups():
    objective = uneven()
    mean = Objective(objective.model, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), objective.loader)
    assert m_sharpness(mean, 0.1, 2).sharpness == pytest.approx(m_sharpness(objective, 0.1, 2).sharpness, rel=1e-12)
