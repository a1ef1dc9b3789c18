"""What the ranks measure: products of every matrix, with the rank's part of the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import nets
from steppe import curvature
from steppe.curvature.objective import Objective
from steppe.curvature.operator import Operator

KINDS = ["hessian", "ggn", "fisher", "empirical"]
SHARDS = {
    "uneven": [[(0, 4), (4, 7), (7, 8)], [(8, 12)]],
    "a rank with one example": [[(0, 11)], [(11, 12)]],
    "three ranks": [[(0, 1)], [(1, 6), (6, 7)], [(7, 9), (9, 11), (11, 12)]],
}


def batches(shards: list[list[tuple[int, int]]], net: str) -> list[nets.Data]:
    x, y = getattr(nets, net)()[1]
    return [(x[a:b], y[a:b]) for shard in shards for a, b in shard]


def share(batch: nets.Data) -> Tensor:
    return batch[0].flatten(1)[:, 0].abs()


def figures(objective: Objective) -> list[Tensor]:
    """Loss, gradient, three products with each matrix, and with its block of biases; and the cost."""
    found = [objective.loss().reshape(1), objective.gradient()]
    for kind in KINDS:
        for each in (objective, objective.only("bias")):
            V = torch.randn(each.size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            A = Operator(each, kind, reuse=True)
            found += [A @ V, A @ V[:, 0]]
    return [*found, torch.tensor([round(objective.passes, 9)], dtype=torch.float64)]


def alone(shards: str, net: str, weights: Any) -> list[Tensor]:
    """The figures of one process with all the data."""
    return figures(Objective(getattr(nets, net)()[0], nets.losses, batches(SHARDS[shards], net), weights=weights))


def together(shards: str, net: str, weights: Any, wrapped: bool) -> list[Tensor]:
    """The figures of the ranks, by a group or by a model in DDP."""
    model = getattr(nets, net)()[0]
    mine = batches([SHARDS[shards][dist.get_rank()]], net)
    if wrapped:
        ddp = DistributedDataParallel(model)
        found = figures(Objective(ddp, nets.losses, mine, weights=weights))
        nets.losses(ddp, mine[0]).sum().backward()  # DDP is as good as new: its gradients are reduced as ever
        return [*found, *[p.grad for p in model.parameters()]]
    return figures(Objective(model, nets.losses, mine, weights=weights, group=dist.group.WORLD))


def drawn(seed: int) -> Tensor:
    """A Fisher matrix from labels that every rank draws for its own examples."""
    model, (x, y) = nets.mlp()
    same = [(x[:4], y[:4])]
    A = Operator(Objective(model, nets.losses, same, group=dist.group.WORLD), "fisher", draws=1, seed=seed)
    B = Operator(Objective(model, nets.losses, same), "fisher", draws=1, seed=seed)
    v = torch.ones(A.size, dtype=torch.float64)
    return torch.stack([A @ v, B @ v])


MEASUREMENTS: dict[str, Callable[[Objective], Any]] = {
    "loss": lambda one: one.loss(),
    "gradient": lambda one: one.gradient(),
    "products": lambda one: Operator(one, reuse=True) @ torch.ones(one.size, dtype=torch.float64),
    "eigenvalues": lambda one: curvature.eigenvalues(Operator(one), 1),
    "trace": lambda one: curvature.trace(Operator(one), 6),
    "gap": curvature.surrogate_gap,
    "groups": lambda one: curvature.m_sharpness(one, 0.1, 2),
    "noise": lambda one: curvature.average_sharpness(one, draws=2),
    "linearity": curvature.linearity,
    "cosines": curvature.cosines,
    "bound": curvature.pac_bayes,
    "kernel": curvature.ntk,
    "activity": curvature.active_neurons,
    "landscape": lambda one: curvature.landscape(one, dims=1, directions="adversarial", points=3),
}


def failing() -> dict[str, str]:
    """What each measurement says where a loss on rank 1 alone is not finite; then it is measured in peace."""
    model, (x, y) = nets.mlp()
    model.insert(2, torch.nn.ReLU())
    bad = torch.tensor([dist.get_rank() == 1])

    def loss_fn(model: Any, batch: nets.Data) -> Tensor:
        return nets.losses(model, batch) + torch.where(bad & (batch[0] == x[5]).all(1), torch.nan, 0.0)

    one, said = Objective(model, loss_fn, [(x[:4], y[:4]), (x[4:7], y[4:7])], group=dist.group.WORLD), {}
    for name, measure in MEASUREMENTS.items():
        try:
            measure(one)
        except ValueError as error:
            said[name] = str(error)
    bad[:] = False
    for measure in MEASUREMENTS.values():
        measure(one)
    return said
