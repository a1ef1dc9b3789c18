"""Conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Solution:
    """Where conjugate gradients stopped."""

    x: Tensor
    """Shape (n,)."""
    iterations: int
    """Steps taken."""
    negative: bool
    """Whether a direction without positive curvature stopped them."""


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    iterations: int,
    tolerance: float = 5e-4,
    start: Tensor | None = None,
) -> Solution:
    """Minimise ``φ(x) = ½ xᵀA x − bᵀx``, which for a positive definite A solves ``A x = b``.

    They stop when φ gains little: at iteration ``i > k = max(10, i/10)`` with ``φᵢ < 0`` and
    ``(φᵢ − φᵢ₋ₖ)/φᵢ < k · tolerance``; when the residual is nothing but rounding; or at a direction p with
    ``pᵀA p ≤ 0``, where the x so far is returned, and b if there is none.

    Args:
        product: ``product(v)`` returns A v; A symmetric.
        b: right-hand side, shape (n,).
        iterations: the most of them, at least 1.
        tolerance: relative gain of φ per iteration below which they stop; 0 for as far as rounding allows.
        start: first x, shape (n,), used if ``φ(start) < 0``; default None for 0.

    Cost:
        A product an iteration, and one for ``start``.

    Source:
        Martens 2010, "Deep learning via Hessian-free optimization", section 4.4; Steihaug 1983, "The conjugate
        gradient method and trust regions in large scale optimization".
    """
    x, r, gains = torch.zeros_like(b), b.clone(), [0.0]
    if start is not None and start.any():
        left = b - product(start)
        gain = -0.5 * float(start @ (b + left))
        if gain < 0:
            x, r, gains = start.clone(), left, [gain]
    p, square = r.clone(), float(r @ r)
    rounding = (torch.finfo(b.dtype).eps * float(b.norm())) ** 2
    for i in range(1, iterations + 1):
        if square <= rounding:
            return Solution(x, i - 1, False)
        along = product(p)
        curvature = float(p @ along)
        if not curvature > 0:
            return Solution(x if x.any() else b.clone(), i - 1, True)
        x += (square / curvature) * p
        r -= (square / curvature) * along
        gains.append(-0.5 * float(x @ (b + r)))
        k = max(10, i // 10)
        if i > k and gains[i] < 0 and (gains[i] - gains[i - k]) / gains[i] < k * tolerance:
            return Solution(x, i, False)
        before, square = square, float(r @ r)
        p = r + (square / before) * p
    return Solution(x, iterations, False)
