"""Symmetric factors of a block: eigenvectors, damped inverses."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def spectrum(matrix: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, at least 0, and eigenvectors of symmetric matrices (..., n, n).

    Raises:
        ValueError: if an entry is not finite, or the eigenvectors are not found.
    """
    _refuse(matrix, what)
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except RuntimeError:  # LinAlgError, which torch does not export by name
        try:
            values, vectors = (t.to(matrix) for t in torch.linalg.eigh(matrix.double()))
        except RuntimeError as error:
            raise ValueError(f"the eigenvectors of the {what} are not found: is the loss diverging?") from error
    return values.clamp_min(0), vectors


def damped_inverses(A: Tensor, G: Tensor, damping: float, name: str) -> tuple[Tensor, Tensor]:
    """Return ``(A + π√λ I)⁻¹`` and ``(G + √λ/π I)⁻¹`` with ``π² = (tr A/dim A) / (tr G/dim G)``, 1 where one is 0.

    Args:
        A: of the inputs, (groups, m, m); or its diagonal, (groups, m), and then so is the inverse.
        G: of the outputs, (groups, n, n).
        damping: λ > 0.
        name: of the layer.

    Raises:
        ValueError: if a matrix is not finite, or singular to rounding.

    Source:
        Martens & Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate curvature", section 6.3.
    """
    is_diagonal = A.ndim == 2
    a = (A if is_diagonal else A.diagonal(dim1=1, dim2=2)).mean(1)
    g = G.diagonal(dim1=1, dim2=2).mean(1)
    pi = torch.where((a > 0) & (g > 0), a / g, 1.0).sqrt().unsqueeze(1)
    left, right = pi * math.sqrt(damping), math.sqrt(damping) / pi
    if is_diagonal:
        _refuse(A, f"input factor of {name}")
        inverse = 1 / (A + left)
    else:
        inverse = _inverse(A, left, f"input factor of {name}", damping)
    return inverse, _inverse(G, right, f"output factor of {name}", damping)


def _inverse(matrix: Tensor, shift: Tensor, what: str, damping: float) -> Tensor:
    _refuse(matrix, what)
    L, failed = torch.linalg.cholesky_ex(matrix + torch.diag_embed(shift.expand(matrix.shape[:-1])))
    if bool(failed.any()):
        raise ValueError(f"the {what} is singular to rounding with damping={damping:g}: choose a larger damping")
    return torch.cholesky_inverse(L)


def _refuse(matrix: Tensor, what: str) -> None:
    if not bool(matrix.isfinite().all()):
        raise ValueError(f"the {what} is not finite: an activation or a gradient is not, or overflows")
