"""The Hessian's products as differences of gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import rounding, vec
from ..batch import Batch
from ..vec import Vec


@torch.no_grad()
def with_differences(
    batch: Batch,
    params: Vec,
    directions: Sequence[Vec],
    *,
    rows: Tensor | None = None,
    again: bool = False,
    weight: float = 1.0,
    scaler: torch.amp.GradScaler | None = None,
    beside: Sequence[Tensor] = (),
) -> tuple[Tensor, list[Tensor | None], list[Vec]]:
    """Return what ``with_products`` does, at half its price, roughly: ``H z ≈ (g(w + h z) − g(w)) / h``.

    ``h = ε^¼ ‖w‖/√d`` for d weights, ε of their type: in float32 about 2 % of the root mean square weight. With smooth
    activations the error is about ``½ h ‖∇³L[z, z]‖``: on the laboratory's ViTs, z of ±1, in 2-norm 9 to 22 % of
    ``H z`` before training and 7 % after; a single probe z of the diagonal is off by far more. With ReLU, h z carries
    units over their kinks, whose curvature double backward does not see: differences see that of a smoothed loss, and
    ``z ⊙ H z`` is 2 to 4 times as large in the mean on the laboratory's networks. The kinks' part falls as 1/√h and the
    rest rises as h; this h is a compromise. Both gradients see the same statistics, random numbers and examples; the
    weights are put back by copy.

    Args:
        batch: as for ``with_products``, and so are the others.
        params: see ``batch``.
        directions: see ``batch``.
        rows: see ``batch``.
        again: see ``batch``.
        weight: see ``batch``.
        scaler: see ``batch``.
        beside: see ``batch``.

    Raises:
        ValueError: if the model is sharded or in bf16 or fp16, or the batch does not replay random numbers.

    Cost:
        A propagation, and 1 for each direction.
    """
    if batch.ranks.sharded:
        raise ValueError(
            "a sharded model has no Hessian-vector product: leave the second-order term, or the second-order base, out"
        )
    if rounding.is_low(params) or batch.autocast is not None:
        raise ValueError('product="difference" drowns in the rounding of bf16 and fp16: take product="exact"')
    if not batch.replay:
        raise ValueError('product="difference" needs both gradients to draw the same: take Batch(replay=True)')

    def gradient(again: bool, beside: Sequence[Tensor] = ()) -> tuple[Tensor, list[Tensor | None]]:
        losses = batch.backward([*params, *beside], rows=rows, again=again, reduce=False, weight=weight, scaler=scaler)
        found = [p.grad for p in params]
        for p in params:
            p.grad = None
        return losses, found

    kept = [p.grad for p in params]
    for p in params:
        p.grad = None
    try:
        losses, here = gradient(again, beside)
        home, products = vec.clone(params), []
        size = float(vec.norm(home)) / math.sqrt(sum(p.numel() for p in params))
        h = (size or 1.0) * max(torch.finfo(p.dtype).eps for p in params) ** 0.25
        try:
            for direction in directions:
                vec.add_(params, direction, h)
                _, there = gradient(True)
                products.append([_quotient(p, a, b, h) for p, a, b in zip(params, here, there, strict=True)])
                vec.copy_(params, home)
        finally:
            vec.copy_(params, home)
    finally:
        for p, slope in zip(params, kept, strict=True):
            p.grad = slope
    return losses, here, products


def _quotient(p: Tensor, a: Tensor | None, b: Tensor | None, h: float) -> Tensor:
    """Return ``(b − a) / h``, a new tensor; 0 where the parameter took no part."""
    return torch.zeros_like(p) if a is None or b is None else b.sub(a).div_(h)
