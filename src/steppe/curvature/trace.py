"""The trace of a symmetric matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .. import checks
from .axes import given_or_new
from .matrix import Matrix, product, signs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AT_ONCE = 8
"""Vectors in a product: an operator runs a batch forward once for all of them."""


@dataclass(frozen=True)
class Trace:
    """An estimate of a trace."""

    value: float
    error: float
    """Standard error; nan if there was a single probe."""
    products: int
    """Products with the matrix."""
    passes: float
    """Their cost in gradients of the data."""

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the estimate with its standard error over the products it took."""
        axes = given_or_new(axes)
        axes.errorbar(self.products, self.value, yerr=self.error, fmt="o", capsize=3)
        axes.set_xlabel("products with the matrix")
        axes.set_ylabel("trace")
        return axes


def trace(
    A: Matrix,
    products: int = 60,
    method: Literal["hutchinson", "hutch++"] = "hutch++",
    *,
    seed: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> Trace:
    """Return the trace of a symmetric matrix, estimated with Rademacher vectors g; unbiased.

        hutchinson:  mean of gᵀ A g
        hutch++:     tr(Qᵀ A Q) + mean of gᵀ P A P g ,    P = 1 − Q Qᵀ ,    Q = orth(A S) ,    S Rademacher

    Hutch++ spends a third of the products on finding the space Q of the large eigenvalues and another on their exact
    trace. It is the better one where few eigenvalues are large, as those of networks are; on a flat spectrum,
    Hutchinson's is, by a factor of ``√3`` in the error.

    Args:
        A: symmetric matrix of n rows.
        products: products to spend, at least 2, for Hutch++ at least 6.
        method: ``"hutchinson"`` or ``"hutch++"``.
        seed: of the vectors.
        progress: called with the share done.

    Raises:
        ValueError: if an argument is out of range, or a product is not finite.

    Cost:
        ``products`` products, eight at a time; Hutch++ keeps a third of them in memory, twice.

    Source:
        Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix"; Meyer, Musco, Musco and
        Woodruff 2021, "Hutch++: optimal stochastic trace estimation", algorithm 1.
    """
    checks.count(products=products)
    checks.one_of(method=(method, ("hutchinson", "hutch++")))
    least = 2 if method == "hutchinson" else 6
    if products < least:
        raise ValueError(f"products={products} must be at least {least} for {method}: else it has no standard error")
    before, generator = A.passes, torch.Generator().manual_seed(seed)
    third = min(products // 3, A.size) if method == "hutch++" else 0
    rest = products - 2 * third
    Q = torch.zeros(A.size, 0, dtype=A.dtype, device=A.device)
    for size in _sizes(third):
        Q = torch.cat([Q, product(A, signs(A, generator, size))], 1)
        progress(Q.shape[1] / products)
    Q = torch.linalg.qr(Q).Q
    inside = [_forms(A, V) for V in Q.split(AT_ONCE, 1)] if third else []
    outside: list[Tensor] = []
    for size in _sizes(rest):
        progress((2 * third + AT_ONCE * len(outside)) / products)
        G = signs(A, generator, size)
        outside.append(_forms(A, G - Q @ (Q.T @ G)))
    progress(1.0)
    found = torch.cat(outside)
    value = found.mean() + sum(forms.sum() for forms in inside)
    return Trace(float(value), float(found.std() / rest**0.5), products, A.passes - before)


def _sizes(count: int) -> list[int]:
    """Return ``count`` as a sum of numbers of at most ``AT_ONCE``."""
    return [min(AT_ONCE, count - done) for done in range(0, count, AT_ONCE)]


def _forms(A: Matrix, V: Tensor) -> Tensor:
    """Return ``vᵀ A v`` of each column."""
    return (V * product(A, V)).sum(0).to("cpu", torch.float64)
