"""Power iteration: the plain way to the largest eigenvalue, to check the Lanczos process with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .. import checks
from .eigenvalues import Eigenvalues
from .matrix import Matrix, first, product, rounding, unit

MIXED = 0.99
"""Below this, the vector holds eigenvectors of both signs: an eigenvector has ``vᵀAv = ±‖Av‖``."""


def power(
    A: Matrix,
    which: Literal["largest", "magnitude"] = "largest",
    *,
    tol: float = 1e-3,
    max_products: int = 1000,
    start: Tensor | None = None,
    seed: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> Eigenvalues:
    """Return the largest eigenvalue of a symmetric matrix, by power iteration.

        v ← (A + σ) v / ‖(A + σ) v‖ ,    λ = vᵀ A v ,    σ = 0 at first

    It leads to the eigenvalue largest in magnitude. Where that turns out to be negative, or nothing has settled after
    half of the products, because two of opposite sign are as large, the iteration goes on with ``σ = ‖A v‖``, where
    the largest eigenvalue has the largest magnitude too. It stops when the residual norm ``‖A v − λ v‖`` is within the
    tolerance.

    Args:
        A: symmetric matrix of n rows.
        which: ``"largest"``, or ``"magnitude"``, which never shifts.
        tol: bound wanted, relative to ``|λ|``.
        max_products: when to give up; the result then says that it has not converged.
        start: vector (n,) to begin with, to which as much noise is added; noise alone by default.
        seed: of the noise.
        progress: called with the share of ``max_products`` done, at the end with 1.

    Returns:
        The one eigenvalue. Its ``errors`` are its ``bounds``: nothing is known of a gap.

    Raises:
        ValueError: if an argument is out of range, or a product is not finite.

    Cost:
        About ``log(1/tol) / log(λ₁/λ₂)`` products, as a rule many more than `eigenvalues` needs.

    Source:
        von Mises and Pollaczek-Geiringer 1929; Parlett 1980, "The symmetric eigenvalue problem", chapter 4.
    """
    checks.count(max_products=max_products)
    checks.non_negative(tol=tol)
    checks.one_of(which=(which, ("largest", "magnitude")))
    before, generator = A.passes, torch.Generator().manual_seed(seed)
    v = first(A, start, generator)
    shift = scale = 0.0
    for products in range(1, max_products + 1):
        progress((products - 1) / max_products)
        image = product(A, v)
        value, size = float(v @ image), float(torch.linalg.vector_norm(image))
        scale = max(scale, size)
        residual, floor = float(torch.linalg.vector_norm(image - value * v)), rounding(A, scale)
        bound = residual + floor
        settled = bound <= tol * abs(value) or residual <= floor
        shiftable = which == "largest" and not shift
        if products == max_products or (settled and not (shiftable and value < 0)):
            break
        if shiftable and (settled or (2 * products >= max_products and value < MIXED * size)):
            shift, v = size, first(A, None, generator)
        else:
            v = unit(image + shift * v)
    progress(1.0)
    bounds = torch.tensor([bound], dtype=torch.float64)
    return Eigenvalues(
        values=torch.tensor([value], dtype=torch.float64),
        bounds=bounds,
        errors=bounds,
        limit=torch.inf,
        converged=torch.tensor([bound <= tol * abs(value) and not (shiftable and value < 0)]),
        vectors=v[None],
        products=products,
        passes=A.passes - before,
    )
