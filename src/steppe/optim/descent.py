"""From gradients to moves: preconditioning, momentum, the trust region."""

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


def directions(blocks: Sequence[Block], states: Sequence[State], dampings: Sequence[float]) -> Move:
    """Return ``(F + λI)⁻¹ g`` of the parameters that have a gradient; the others' counts as 0 in their blocks.

    Raises:
        ValueError: if a gradient is sparse.
    """
    found: Move = {}
    for block, state, damping in zip(blocks, states, dampings, strict=True):
        slopes = [p.grad for p in block.params]
        if any(g is not None and g.layout != torch.strided for g in slopes):
            raise ValueError(f"{block.name} has a sparse gradient: build the layer with sparse=False")
        if all(g is None for g in slopes):
            continue
        whole = [torch.zeros_like(p) if g is None else g for p, g in zip(block.params, slopes, strict=True)]
        solved = block.solve(state, [g.to(torch.promote_types(g.dtype, torch.float32)) for g in whole], damping)
        for p, g, d in zip(block.params, slopes, solved, strict=True):
            if g is not None:
                found[p] = d.contiguous()
    return found


def move(group: dict[str, Any], directions: Move, kept: Mapping[Tensor, State]) -> Move:
    """Return ``μm + d`` of a group's parameters that have a direction, which is overwritten."""
    weights = [p for p in group["params"] if p in directions]
    if group["momentum"]:
        moving = [p for p in weights if "momentum" in kept.get(p, ())]
        vec.add_([directions[p] for p in moving], [kept[p]["momentum"] for p in moving], group["momentum"])
    return {p: directions[p] for p in weights}


def trust(blocks: Sequence[Block], states: Sequence[State], moves: Sequence[tuple[float, Move]], kl: float) -> float:
    """Return the factor ``min(1, √(kl / ½uᵀFu))`` of ``u = lr·m``, the moves with their learning rates.

    Raises:
        ValueError: if ``uᵀFu`` is not finite.
    """
    steps = {p: lr * m for lr, each in moves for p, m in each.items()}
    moved = 0.0
    for block, state in zip(blocks, states, strict=True):
        if any(p in steps for p in block.params):
            u = [steps[p] if p in steps else torch.zeros_like(p) for p in block.params]
            moved += float(block.quadratic(state, u)) / 2
    if not math.isfinite(moved):
        raise ValueError("the divergence of this step is not finite: choose a larger damping or a smaller lr")
    return math.sqrt(kl / moved) if moved > kl else 1.0
