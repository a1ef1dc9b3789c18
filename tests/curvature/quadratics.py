"""Losses whose curvature is known: ``ℓᵢ(w) = ½ (w − cᵢ)ᵀ H (w − cᵢ)``, with the cᵢ for data."""

from __future__ import annotations

import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from steppe.curvature.objective import Objective


class Quadratic(nn.Module):
    def __init__(self, matrix: Tensor, start: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.w = nn.Parameter(start.clone())

    def forward(self, centres: Tensor) -> Tensor:
        far = self.w - centres
        return 0.5 * ((far @ self.matrix) * far).sum(1)


def losses(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    return model(*batch)


def symmetric(eigenvalues: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix of that spectrum, and its eigenvectors as columns."""
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return (q * eigenvalues) @ q.T, q


def quadratic(eigenvalues: Tensor, start: Tensor, centres: list[Tensor], **how) -> Objective:
    matrix, _ = symmetric(eigenvalues)
    return Objective(Quadratic(matrix, start), losses, [(c,) for c in centres], **how)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def trust_region(matrix: Tensor, g: Tensor, rho: float) -> float:
    """``max gᵀε + ½ εᵀHε`` over ``‖ε‖ ≤ ρ`` where it lies on the sphere: ``(λ − H) ε = g`` with ``λ > λmax``."""
    eigenvalues, q = torch.linalg.eigh(matrix)
    b = q.T @ g

    def excess(multiplier: float) -> float:
        return float((b / (multiplier - eigenvalues)).norm()) - rho

    top = float(eigenvalues[-1])
    low = top + 0.5 * abs(float(b[-1])) / rho
    multiplier = brentq(excess, low, top + 2 * float(g.norm()) / rho, xtol=1e-15, rtol=1e-15)
    e = b / (multiplier - eigenvalues)
    return float(b @ e + 0.5 * (eigenvalues * e * e).sum())
