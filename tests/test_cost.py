"""``method.cost()`` predicts what ``opt.stats`` counts, and both say what really ran."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import steppe
from nets import losses, mlp

# expression, cost as the papers state it at a batch of 12 and in the limit of many steps
COSTS = {
    "sgd()": 1,
    "sam()": 2,
    "sam(p=inf)": 2,
    "sam(steps=3)": 4,
    "sam(second_order=True)": 2 + 3,
    "m_sharpness(sam(), 5)": 2,
    "m_sharpness(esam_sds(), 5)": 4 / 3 + (2 + 2 + 1) / 12,
    "asam()": 2,
    "mixed_sam()": 2,
    "gnr()": 2,
    "gsam()": 2,
    "gsam_min()": 2,
    "gsam_penalty()": 2,
    "esam()": 1 - 0.4 / 3 + 1 / 3 + 0.5,
    "esam(beta=0.5, gamma=0.3)": 1 - 0.5 / 3 + 1 / 3 + 3 / 12,
    "esam_swp()": 2 - 0.4 / 3,
    "esam_sds()": 4 / 3 + 0.5,
    "rwp()": 2,
    "rwp(other=True)": 2,
    "rwp(alpha=0)": 1,
    "rst(sam(), p=0.5)": 1.5,
    "rst(esam(), p=0.5)": (1 + 1 - 0.4 / 3 + 1 / 3 + 0.5) / 2,
    "rst(rwp(alpha=0), p=0.5)": 1,
    "rst(looksam(k=5), p=linear(0, 1))": 1.1,
    "grst(gsam(), p=0.5, strength=2)": 1.5,
    "looksam()": 1.2,
    "looksam(k=2)": 1.5,
    "ssam(n=6, refresh=10)": 2 + 0.05,
    "rst(ssam(n=6, refresh=4), p=linear(0, 1))": 1.5 + 0.5 * 0.5 / 4,
    "ssam_dynamic()": 2,
}


@pytest.mark.parametrize("expression", COSTS)
def test_cost_is_what_the_papers_state(expression):
    assert steppe.parse(expression).cost(batch_size=12) == pytest.approx(COSTS[expression], abs=1e-12)


@pytest.mark.parametrize("expression", COSTS)
def test_the_prediction_is_what_is_counted(expression):
    model, batch = mlp()
    method, steps = steppe.parse(expression), 200
    opt = steppe.SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.01), method, total_steps=steps)
    second = steppe.Batch(model, losses, batch) if method.needs_second else None
    for _ in range(steps):
        opt.step(steppe.Batch(model, losses, batch), second)
    predicted = method.cost(batch_size=12, total_steps=steps)
    if "rst(" not in expression and method.perturb.share == 1:
        assert opt.stats.propagations == pytest.approx(predicted, abs=1e-12)
        return
    # a step's cost is random in an interval of length 1 at most: four deviations of a mean of 200
    assert abs(opt.stats.propagations - predicted) < 4 * 0.5 / math.sqrt(steps)


@pytest.mark.parametrize("expression", [e for e in COSTS if e != "sam(second_order=True)"])
def test_the_forward_count_is_what_the_model_sees(expression):
    model, batch = mlp()
    seen = []
    model.register_forward_hook(lambda _m, inputs, _out: seen.append(len(inputs[0])))
    method = steppe.parse(expression)
    opt = steppe.SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.01), method, total_steps=40)
    second = steppe.Batch(model, losses, batch) if method.needs_second else None
    for _ in range(40):
        opt.step(steppe.Batch(model, losses, batch), second)
    assert opt.stats.forward == sum(seen)
    assert opt.stats.examples == 40 * 12
    assert opt.stats.steps == 40


def test_unpicked_tensors_are_not_differentiated():
    """The native kernels compute a weight gradient only where it is asked for: counted in the profiler."""
    torch.manual_seed(0)
    layers = [nn.Linear(16, 16, bias=False) for _ in range(10)]
    model = nn.Sequential(*layers, nn.Linear(16, 3, bias=False))
    batch = (torch.randn(8, 16), torch.randint(3, (8,)))
    method = steppe.esam_swp(beta=0.5)
    opt = steppe.SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.0), method)

    def matrix_products(backward):
        with torch.profiler.profile() as profile:
            backward()
        return sum(e.count for e in profile.key_averages() if e.key == "aten::mm")

    params = list(model.parameters())
    everything = matrix_products(lambda: steppe.Batch(model, losses, batch).backward(None))
    point = opt._point(params, 0)
    picked = [p for p, pick in zip(params, method.perturb.picks(point, len(params)), strict=True) if pick]
    assert 0 < len(picked) < len(params)
    some = matrix_products(lambda: steppe.Batch(model, losses, batch).backward(picked))
    first = next(i for i, p in enumerate(params) if any(p is q for q in picked))
    forward = len(params)
    assert everything == forward + len(params) + len(params) - 1
    assert some == forward + len(picked) + (len(params) - 1 - first)


@pytest.mark.parametrize(
    "expression",
    [
        "looksam(ssam(n=6, refresh=5), k=5)",
        "looksam(ssam(n=6, refresh=4), k=5)",
        "looksam(ssam(n=6, refresh=10), k=5)",
        "looksam(k=4)",
    ],
)
def test_intervals_that_fall_on_one_another_are_counted_together(expression):
    model, batch = mlp()
    method, steps = steppe.parse(expression), 201
    opt = steppe.SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.01), method, total_steps=steps)
    for _ in range(steps):
        opt.step(steppe.Batch(model, losses, batch))
    assert method.cost(12, steps) == pytest.approx(opt.stats.propagations, abs=1e-12)
    assert method.cost(12) == pytest.approx(opt.stats.propagations, abs=0.02)


@pytest.mark.parametrize(
    ("expression", "total", "cost"),
    [
        ("rst(looksam(k=5), p=linear(0, 1))", 10, 1 + (0 + 5 / 10) / 10),
        ("rst(looksam(k=5), p=linear(0, 1))", 20, 1 + (0 + 5 + 10 + 15) / 20 / 20),
        ("rst(ssam(n=6, refresh=4), p=linear(0, 1))", 12, 1 + sum(range(12)) / 12 / 12 + (4 + 8) / 12 * 0.5 / 12),
    ],
)
def test_a_schedule_over_intervals_is_read_at_the_steps_that_are_due(expression, total, cost):
    assert steppe.parse(expression).cost(batch_size=12, total_steps=total) == pytest.approx(cost, abs=1e-12)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"batch_size": -5}, {"total_steps": 0}, {"total_steps": 1.5}])
def test_the_cost_of_no_step_at_all_is_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        steppe.parse("rst(esam(), p=linear(0, 1))").cost(**wrong)


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("at", ["perturbed", "weights"])
def test_curvature_due_on_sharp_steps_only_costs_what_their_passes_cost(at, k):
    model, batch = mlp()
    method = steppe.parse(f"looksam(esam_sds(), k={k})")
    base = steppe.optim.AdaHessian(model.parameters(), lr=0.01, n=3, at=at)
    opt = steppe.SharpnessAware(base, method, total_steps=60)
    for _ in range(60):
        opt.step(steppe.Batch(model, losses, batch))
    assert base.cost_under(method, 12, 60) == pytest.approx(opt.stats.propagations, abs=1e-12)


@pytest.mark.parametrize(("gamma", "size", "count"), [(0.7, 90, 63), (0.29, 100, 29), (0.5, 11, 5), (0.01, 12, 1)])
def test_the_selection_has_as_many_examples_as_stated(gamma, size, count):
    """0.7 · 90 is 62.99… in floating point."""
    select = steppe.esam_sds(gamma=gamma).select
    assert select.count(size) == count
    assert len(select(torch.arange(float(size)))) == count


def test_a_step_that_failed_counts_its_examples_as_it_counts_its_passes():
    model, batch = mlp()
    opt = steppe.SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.01), steppe.sam())
    with pytest.raises(ValueError, match="nan"):
        opt.step(steppe.Batch(model, lambda m, b: losses(m, b) * math.nan, batch))
    opt.step(steppe.Batch(model, losses, batch))
    assert (opt.stats.steps, opt.stats.examples, opt.stats.propagations) == (1, 24, 2)
