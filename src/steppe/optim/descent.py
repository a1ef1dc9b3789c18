"""From gradients to moves: momentum, preconditioning, the trust region."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import vec
from .blocks import Block
from .found import State

Move = dict[Tensor, Tensor]


def averaged(group: dict[str, Any], kept: Mapping[Tensor, State]) -> Move:
    """Return ``m = g + μ m`` of a group's parameters that have a gradient, new tensors of at least float32.

    Raises:
        ValueError: if a gradient is sparse.
    """
    found: Move = {}
    for p in group["params"]:
        if p.grad is None:
            continue
        if p.grad.layout != torch.strided:
            raise ValueError(f"a parameter of shape {tuple(p.shape)} has a sparse gradient: build the layer with "
                             "sparse=False")  # fmt: skip
        found[p] = p.grad.to(torch.promote_types(p.grad.dtype, torch.float32), copy=bool(group["momentum"]))
    if group["momentum"]:
        moving = [p for p in found if "momentum" in kept.get(p, ())]
        vec.add_([found[p] for p in moving], [kept[p]["momentum"] for p in moving], group["momentum"])
    return found


def directions(
    blocks: Sequence[Block], states: Sequence[State], dampings: Sequence[float], averages: Move
) -> list[Move]:
    """Return ``d = (F + λI)⁻¹ m`` of each block; what has no average counts as 0, and does not move."""
    found: list[Move] = []
    for block, state, damping in zip(blocks, states, dampings, strict=True):
        if not any(p in averages for p in block.params):
            found.append({})
            continue
        whole = [averages[p] if p in averages else torch.zeros_like(p) for p in block.params]
        solved = block.solve(state, whole, damping)
        found.append({p: d.contiguous() for p, d in zip(block.params, solved, strict=True) if p in averages})
    return found


def trust(
    blocks: Sequence[Block],
    states: Sequence[State],
    dampings: Sequence[float],
    averages: Move,
    directions: Sequence[Move],
    rates: Mapping[Tensor, float],
    kl: float,
) -> float:
    """Return the factor ``min(1, √(kl / ½uᵀFu))`` of ``u = lr·d``.

    Where a block is solved exactly and moves as a whole, ``dᵀFd = dᵀm − λ‖d‖²`` needs no product with F.

    Raises:
        ValueError: if ``uᵀFu`` is not finite.
    """
    moved = 0.0
    for block, state, damping, d in zip(blocks, states, dampings, directions, strict=True):
        lrs = {rates[p] for p in d}
        if block.is_exact and len(lrs) == 1 and len(d) == len(block.params):
            along = vec.dot(list(d.values()), [averages[p] for p in d])
            size = max(0.0, float(along - damping * vec.dot(list(d.values()), list(d.values()))))
            moved += lrs.pop() ** 2 * size / 2 if math.isfinite(float(along)) else math.nan
        elif d:
            u = [rates[p] * d[p] if p in d else torch.zeros_like(p) for p in block.params]
            moved += float(block.quadratic(state, u)) / 2
    if not math.isfinite(moved):
        raise ValueError("the divergence of this step is not finite: choose a larger damping or a smaller lr")
    return math.sqrt(kl / moved) if moved > kl else 1.0
