"""A symmetric matrix known by its products, and the random vectors to probe it with."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Generator, Tensor


class Matrix(Protocol):
    """A symmetric matrix ``A`` of which no more is known than ``A @ v``, v of shape (n,) or (n, k)."""

    @property
    def size(self) -> int:
        """Rows, and columns."""

    @property
    def device(self) -> torch.device:
        """Where vectors live."""

    @property
    def dtype(self) -> torch.dtype:
        """Their type: float32 or float64."""

    @property
    def passes(self) -> float:
        """Cost of all products so far, in gradient passes over the data."""

    def __matmul__(self, v: Tensor) -> Tensor: ...


def product(A: Matrix, v: Tensor) -> Tensor:
    """Return ``A @ v``.

    Raises:
        ValueError: if it is not finite.
    """
    out = A @ v
    if not bool(out.isfinite().all()):
        raise ValueError("A @ v is not finite: look for weights or losses that are infinite or not a number")
    return out


def first(A: Matrix, start: Tensor | None, generator: Generator) -> Tensor:
    """Return a unit vector to begin with: noise, drawn on the CPU so as to be the same on every device, and ``start``.

    Both have the same share.

    Raises:
        ValueError: if start is no finite vector (n,).
    """
    noise = unit(torch.randn(A.size, dtype=A.dtype, generator=generator).to(A.device))
    if start is None:
        return noise
    if start.shape != (A.size,) or not bool(start.isfinite().all()):
        raise ValueError(f"start must be a finite vector of {A.size} entries, got shape {tuple(start.shape)}")
    start = start.to(noise)
    return unit(noise + unit(start)) if start.any() else noise


def unit(v: Tensor) -> Tensor:
    """Return ``v/‖v‖``."""
    direction: Tensor = v / torch.linalg.vector_norm(v)
    return direction


def rounding(A: Matrix, scale: float) -> float:
    """Return what rounding may add to a residual where ``‖A‖ = scale``: ten times the precision of A's type."""
    return 10 * torch.finfo(A.dtype).eps * scale


def signs(A: Matrix, generator: Generator, count: int) -> Tensor:
    """Return ``count`` Rademacher vectors, entries ±1, as columns (n, count): drawn on the CPU, one after the other."""
    rows = torch.empty(count, A.size, dtype=A.dtype).bernoulli_(generator=generator)
    return rows.mul_(2).sub_(1).T.to(A.device)
