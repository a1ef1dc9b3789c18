"""Dense symmetric matrices that count their products, to try the numerical methods on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Dense:
    """A dense matrix, known by its products."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.size, self.device, self.dtype = len(matrix), matrix.device, matrix.dtype
        self.passes = 0.0

    def __matmul__(self, v: Tensor) -> Tensor:
        assert v.dtype == self.dtype
        self.passes += 1 if v.ndim == 1 else v.shape[1]
        return self.matrix @ v


class Diagonal(Dense):
    """A diagonal matrix, known by its products."""

    def __matmul__(self, v: Tensor) -> Tensor:
        self.passes += 1 if v.ndim == 1 else v.shape[1]
        return self.matrix * v if v.ndim == 1 else self.matrix[:, None] * v


def diagonal_of(*values: float) -> Dense:
    return Diagonal(torch.tensor(values, dtype=torch.float64))


def with_spectrum(values: Sequence[float] | Tensor, seed: int = 0, dtype: torch.dtype = torch.float64) -> Dense:
    """A matrix with these eigenvalues and random eigenvectors."""
    values = torch.as_tensor(values, dtype=torch.float64)
    Q, _ = torch.linalg.qr(normal(len(values), len(values), seed=seed))
    matrix = (Q * values) @ Q.T
    return Dense(((matrix + matrix.T) / 2).to(dtype))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def network_like(n: int = 300) -> Tensor:
    """A few large eigenvalues, two negative ones, and a bulk around zero, ascending."""
    return torch.cat(
        [torch.tensor([-4.0, -3.0]), torch.linspace(-1, 1, n - 6), torch.tensor([5.0, 6.0, 8.0, 10.0])]
    ).double()
