"""The diagonal of a symmetric matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import checks
from .axes import given_or_new
from .matrix import Matrix, product, signs

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class Diagonal:
    """An estimate of a diagonal."""

    values: Tensor
    """Shape (n,), where the matrix lives."""
    errors: Tensor
    """Standard error of each entry, shape (n,)."""
    products: int
    """Products with the matrix."""
    passes: float
    """Their cost in gradients of the data."""

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw how the entries are distributed, and for comparison their standard errors, on logarithmic scales."""
        axes = given_or_new(axes)
        sizes = {"entries, absolute": self.values.abs(), "standard errors": self.errors}
        logs = {name: x[x > 0].log10().cpu().double() for name, x in sizes.items()}
        for name, x in logs.items():
            axes.hist(x.numpy(), bins=100, histtype="step", label=name)
        axes.set_yscale("log")
        axes.set_xlabel("log₁₀ of size")
        axes.set_ylabel("entries")
        axes.legend()
        return axes


def diagonal(
    A: Matrix,
    products: int = 30,
    *,
    seed: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> Diagonal:
    """Return the diagonal of a symmetric matrix, estimated with Rademacher vectors v; unbiased.

        d = mean of v ⊙ A v

    The variance of entry i is ``Σ_{j≠i} Aᵢⱼ²`` over the number of vectors: single entries need many, their mean over
    a layer few.

    Args:
        A: symmetric matrix of n rows.
        products: products to spend, one for each vector, at least 2.
        seed: of the vectors.
        progress: called with the share done.

    Raises:
        ValueError: if an argument is out of range, or a product is not finite.

    Cost:
        ``products`` products.

    Source:
        Bekas, Kokiopoulou and Saad 2007, "An estimator for the diagonal of a matrix".
    """
    checks.count(products=products)
    if products < 2:
        raise ValueError("products=1 must be at least 2: else there is no standard error")
    before, generator = A.passes, torch.Generator().manual_seed(seed)
    mean = torch.zeros(A.size, dtype=A.dtype, device=A.device)
    spread = torch.zeros_like(mean)
    for count in range(1, products + 1):
        progress((count - 1) / products)
        v = signs(A, generator, 1)[:, 0]
        found = v * product(A, v)
        change = found - mean
        mean += change / count
        spread += change * (found - mean)
    progress(1.0)
    return Diagonal(mean, (spread / (products - 1) / products).sqrt(), products, A.passes - before)
