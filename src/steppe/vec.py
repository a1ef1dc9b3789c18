"""Arithmetic on lists of tensors: the only file that sees ``torch._foreach_*``.

A ``Vec`` is one vector of the whole parameter space, kept as the list of its tensors. Functions whose name ends
in an underscore overwrite their first argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Vec: TypeAlias = list[Tensor]


def norm(u: Sequence[Tensor], p: float = 2.0) -> Tensor:
    """Return ``‖u‖_p`` over all entries of all tensors, as a tensor of no dimensions."""
    if not u:
        return torch.zeros(())
    parts = torch._foreach_norm(list(u), p)
    total: Tensor = torch.linalg.vector_norm(torch.stack([part.to(parts[0]) for part in parts]), p)
    return total


def dot(u: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:
    """Return ``uᵀv`` over all entries, as a tensor of no dimensions."""
    if not u:
        return torch.zeros(())
    parts = [torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in zip(u, v, strict=True)]
    return torch.stack([part.to(parts[0]) for part in parts]).sum()


def over(numerator: float, denominator: Tensor) -> Tensor:
    """Return ``numerator / denominator``, finite where the denominator is 0: a vanishing gradient has no direction."""
    return numerator / denominator.clamp_min(torch.finfo(denominator.dtype).tiny)


def clone(u: Sequence[Tensor]) -> Vec:
    """Return a copy that shares no memory with ``u``."""
    return [t.detach().clone() for t in u]


def copy_(u: Sequence[Tensor], v: Sequence[Tensor]) -> None:
    """Overwrite ``u`` by ``v``, to the bit."""
    if u:
        torch._foreach_copy_(list(u), list(v))


def scale_(u: Sequence[Tensor], c: Tensor | float) -> None:
    """Overwrite ``u`` by ``c·u``."""
    if u:
        torch._foreach_mul_(list(u), c)


def add_(u: Sequence[Tensor], v: Sequence[Tensor], c: Tensor | float = 1.0) -> None:
    """Overwrite ``u`` by ``u + c·v``; without a copy of ``v`` where ``c`` is on the CPU."""
    if not u:
        return
    if isinstance(c, Tensor) and c.device.type != "cpu":
        torch._foreach_add_(list(u), torch._foreach_mul(list(v), c))
    else:
        torch._foreach_add_(list(u), list(v), alpha=float(c))


def mul_(u: Sequence[Tensor], v: Sequence[Tensor]) -> None:
    """Overwrite ``u`` by the entry-wise product ``u ⊙ v``."""
    if u:
        torch._foreach_mul_(list(u), list(v))


def lerp_(u: Sequence[Tensor], v: Sequence[Tensor], c: float) -> None:
    """Overwrite ``u`` by ``u + c·(v − u)``; ``c`` may lie outside [0, 1]."""
    if u:
        torch._foreach_lerp_(list(u), list(v), c)


def reject(u: Vec, v: Vec) -> Vec:
    """Return the part of ``u`` orthogonal to ``v``: ``u − (uᵀv̂) v̂``; ``u`` itself where ``v = 0``."""
    part = clone(u)
    add_(part, v, dot(u, v) * over(-1.0, dot(v, v)))
    return part
