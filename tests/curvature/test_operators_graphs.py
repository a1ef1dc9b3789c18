"""Graphs are kept where asked, freed where not, and never served stale; memory does not grow; cost is booked."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from exact import gap, losses, made, operator, probes, small, uneven
from steppe.curvature.objective import Objective
from steppe.curvature.operator import Operator

KINDS = ["hessian", "ggn", "fisher", "empirical"]
BATCHES = uneven(4, sizes=(4, 3, 2))


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow(kind, reuse):
    """The published bug. There are no cycles either, which the collector would have to find."""
    A = operator(small(), losses, BATCHES[:2], kind, reuse=reuse)
    v = probes(43, 1)[:, 0]
    gc.collect()
    gc.disable()
    try:
        A @ v
        before = tensors()
        for _ in range(50):
            A @ v
        assert tensors() == before
        assert grown(lambda: A @ v, 5) == 0
    finally:
        gc.enable()


def test_the_published_bug_would_be_seen():
    model = small()

    def bug():
        losses(model, BATCHES[0]).mean().backward(create_graph=True)

    with pytest.warns(UserWarning, match="reference cycle"):
        assert grown(bug, 5) > 1000


def grown(run: Callable[[], Any], times: int) -> int:
    """Bytes that torch has allocated and not freed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(times):
            run()
    return sum(event.self_cpu_memory_usage for event in profiler.events())


def tensors() -> int:
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["release", "del", "weights"])
def test_kept_graphs_are_freed(kind, how):
    """A graph holds the activations: they are gone once the operator lets go of it."""
    model, alive = small(), []

    def watch(module, inputs, output):
        alive.append(weakref.ref(output))

    model[1].register_forward_hook(watch)
    A = operator(model, losses, BATCHES, kind, reuse=True)
    v = probes(43, 1)[:, 0]
    gc.disable()
    try:
        A @ v
        A @ v
        assert [ref() is not None for ref in alive] == [True] * 3
        if how == "release":
            A.release()
        elif how == "del":
            del A
        else:
            with torch.no_grad():
                model[0].weight.mul_(2)
            A @ v
            assert [ref() is not None for ref in alive] == [False] * 3 + [True] * 3
            return
        assert not [ref for ref in alive if ref() is not None]
    finally:
        gc.enable()


def test_without_reuse_no_graph_is_kept():
    model, alive = small(), []
    model[1].register_forward_hook(lambda module, inputs, output: alive.append(weakref.ref(output)))
    gc.disable()
    try:
        for kind in KINDS:
            A = operator(model, losses, BATCHES, kind)
            A @ probes(43)
            assert len(alive) == 3
            assert not [ref for ref in alive if ref() is not None]
            alive.clear()
    finally:
        gc.enable()


def in_place(model):
    with torch.no_grad():
        model[0].weight.mul_(1.1)


def optimizer(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def load(model):
    model.load_state_dict({name: t + 0.1 for name, t in model.state_dict().items()})


def data_in_place(model):
    model[0].weight.data.mul_(1.1)


def data_flipped(model):
    model[0].weight.data.neg_()


def data_swapped(model):
    model[0].weight.data = model[0].weight.data * 1.1


def other_weights(model):
    """Those of a layer that is not measured."""
    with torch.no_grad():
        model[3].weight.mul_(1.1)


def buffer(model):
    model[1].running_var.mul_(2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change", [in_place, optimizer, load, data_in_place, data_flipped, data_swapped, other_weights, buffer]
)
def test_a_stale_graph_is_never_served(kind, change):
    model = made(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))).eval()
    A = operator(model, losses, BATCHES, kind, reuse=True, params=model[0])
    v = probes(25, 1)[:, 0]
    first = A @ v
    assert torch.equal(A @ v, first)
    change(model)
    fresh = operator(copy.deepcopy(model), losses, BATCHES, kind, params=r"^0") @ v
    assert gap(fresh, first) > 1e-3
    assert gap(A @ v, fresh) < 1e-13
    assert gap(A @ v, fresh) < 1e-13


def test_a_graph_is_kept_where_there_is_one_batch():
    calls = []

    def loss_fn(model, batch):
        calls.append(1)
        return losses(model, batch)

    v = probes(43, 1)[:, 0]
    for batches, kwargs, wanted in (
        (BATCHES[:1], {}, 1),
        (BATCHES, {"max_batches": 1}, 1),
        (BATCHES, {}, 9),
        (BATCHES, {"reuse": True}, 3),
        (BATCHES[:1], {"reuse": False}, 3),
    ):
        calls.clear()
        A = operator(small(), loss_fn, batches, **kwargs)
        for _ in range(3):
            A @ v
        assert len(calls) == wanted


@pytest.mark.parametrize(("kind", "each"), [("hessian", 2), ("ggn", 4 / 3), ("fisher", 4 / 3), ("empirical", 4 / 3)])
def test_cost_is_booked(kind, each):
    objective = Objective(small(), losses, BATCHES)
    v = probes(43, 2)
    A = Operator(objective, kind)
    assert A.passes == 0
    A @ v[:, 0]
    assert abs(A.passes - (1 + each)) < 1e-12
    A @ v
    assert abs(A.passes - (2 + 3 * each)) < 1e-12
    B = Operator(objective.only("bias"), kind, reuse=True)
    start = objective.passes
    for _ in range(3):
        B @ v[:8, 0]
    assert abs(objective.passes - start - (1 + 3 * each)) < 1e-12
    start = objective.passes
    objective.loss()
    objective.gradient()
    assert abs(objective.passes - start - 4 / 3) < 1e-12
