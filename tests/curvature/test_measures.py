"""What holds for every measure of sharpness: no trace in the model, clear errors, the share done."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nets
from states import same, snapshot
from steppe.curvature.activity import active_neurons
from steppe.curvature.average import average_sharpness
from steppe.curvature.bound import pac_bayes
from steppe.curvature.cosines import cosines
from steppe.curvature.filters import filter_norms
from steppe.curvature.linearity import linearity
from steppe.curvature.ntk import ntk
from steppe.curvature.objective import Objective
from steppe.curvature.sharpness import m_sharpness, surrogate_gap

Measure = Callable[..., Any]
MEASURES: dict[str, Measure] = {
    "surrogate_gap": lambda o, **how: surrogate_gap(o, steps=2, **how),
    "m_sharpness": lambda o, **how: m_sharpness(o, 0.05, 3, steps=2, **how),
    "average_gaussian": lambda o, **how: average_sharpness(o, "gaussian", draws=2, **how),
    "average_filter": lambda o, **how: average_sharpness(o, draws=2, **how),
    "linearity": lambda o, **how: linearity(o, beta=0.7, **how),
    "cosines": cosines,
    "pac_bayes": pac_bayes,
    "ntk": lambda o, **how: ntk(o, 3, **how),
    "active_neurons": active_neurons,
}
each = pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)


def build(**how: Any) -> Objective:
    """A model with running statistics, dropout, layers in different modes, a frozen weight and gradients."""
    model, (x, y) = nets.convnet()
    model.insert(7, nn.Dropout(0.3))
    model.train()
    model[4].eval()
    model[0].weight.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    return Objective(model, how.pop("loss_fn", nets.losses), loader, **how)


@pytest.mark.parametrize(
    ("name", "mode"), [(n, m) for n in MEASURES for m in ("eval", "train") if (n, m) != ("ntk", "train")]
)
def test_no_trace_is_left(name, mode):
    objective = build(mode=mode)
    before = snapshot(objective.model)
    MEASURES[name](objective)
    assert same(snapshot(objective.model), before)


@each
@pytest.mark.parametrize("call", [1, 2, 3])
def test_no_trace_is_left_on_an_exception(measure, call):
    calls = 0

    def fails(model: nn.Module, batch: nets.Data) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return nets.losses(model, batch)

    objective = build(loss_fn=fails)
    before = snapshot(objective.model)
    with pytest.raises(KeyboardInterrupt):
        measure(objective)
    assert same(snapshot(objective.model), before)


@each
def test_a_loss_that_is_not_finite_is_refused(measure):
    def broken(model: nn.Module, batch: nets.Data) -> Tensor:
        losses = nets.losses(model, batch)
        return torch.where(torch.arange(len(losses)) == 1, math.nan, losses) if len(losses) > 1 else losses * math.nan

    with pytest.raises(ValueError, match="the loss is nan in batch 0 of the loader"):
        measure(build(loss_fn=broken))


@each
def test_the_same_call_gives_the_same_result(measure):
    torch.manual_seed(1)
    one = measure(build(mode="eval"))
    torch.manual_seed(2)
    other = measure(build(mode="eval"))
    assert repr(one) == repr(other)


@each
def test_the_share_done_grows_to_1(measure):
    seen: list[float] = []
    measure(build(), progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["surrogate_gap", "m_sharpness", "pac_bayes", "ntk", "active_neurons"])
def test_float32_agrees_with_float64(name):
    """Those without draws, which differ."""
    model, (x, y) = nets.mlp()
    model.insert(2, nn.ReLU())
    wide = MEASURES[name](Objective(model, nets.losses, [(x, y)]))
    narrow = MEASURES[name](Objective(model.float(), nets.losses, [(x.float(), y)]))
    figures = {key: value for key, value in vars(wide).items() if isinstance(value, float) and key != "curvature"}
    for key, value in figures.items():
        assert getattr(narrow, key) == pytest.approx(value, rel=1e-3), key


def test_filter_norms_leave_no_trace():
    objective = build()
    before = snapshot(objective.model)
    filter_norms(objective)
    assert same(snapshot(objective.model), before)


def test_only_the_chosen_parameters_move():
    seen: list[bool] = []
    model, batch = nets.mlp()
    start = model[0].weight.detach().clone()

    def loss(model: nn.Module, batch: nets.Data) -> Tensor:
        seen.append(torch.equal(model[0].weight, start))
        return nets.losses(model, batch)

    for name in ("surrogate_gap", "m_sharpness", "average_gaussian", "average_filter", "linearity", "cosines"):
        MEASURES[name](Objective(model, loss, [batch], params=r"^[24]\."))
    assert seen
    assert all(seen)
