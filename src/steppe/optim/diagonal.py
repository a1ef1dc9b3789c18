"""A diagonal of the Fisher matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..vec import Vec


class Diagonal:
    """One parameter, the entries of which are taken for independent.

    ``F = diag(f)``, ``f = B ḡ ⊙ ḡ`` with ḡ the gradient of the mean loss over B examples with labels drawn from the
    model: their slopes are independent and have mean 0, so f is right in the mean. With the data's own labels they have
    not, and f is what Adam averages, times B: too large by B times the square of the mean gradient.

    Args:
        parameter: The parameter.
        name: Its name, for messages.

    Source:
        Liu et al. 2023, "Sophia: a scalable stochastic second-order optimizer", algorithm 2.
    """

    def __init__(self, parameter: Tensor, name: str) -> None:
        self.params, self.name = [parameter], name
        self.is_exact = True

    def price(self) -> float:
        """Nothing is inverted ahead."""
        return 0.0

    def invert(self, state: dict[str, Tensor], damping: float) -> dict[str, Tensor]:
        """Nothing is kept."""
        return {}

    def solve(self, state: dict[str, Tensor], gradients: Vec, damping: float) -> Vec:
        """``g / (f + λ)``."""
        return [gradients[0] / (state["diagonal"] + damping)]

    def quadratic(self, state: dict[str, Tensor], d: Vec) -> Tensor:
        """``Σ f d²``."""
        return (state["diagonal"] * d[0] * d[0]).sum()


def squares(root: Tensor, score: Tensor, params: Vec) -> Vec:
    """Return ``Σ_n (Jₙᵀ sₙ)²``, each example by itself, J the Jacobian of ``root`` by the parameters.

    Cost:
        2/3 propagations for each example.
    """
    total = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params]
    for i in range(len(score)):
        alone = torch.zeros_like(score)
        alone[i] = score[i]
        add_squares_(total, torch.autograd.grad(root, params, alone, retain_graph=True, allow_unused=True))
    return total


def add_squares_(total: Vec, slopes: Sequence[Tensor | None]) -> None:
    """Add the squares of the slopes, where there are any."""
    for t, slope in zip(total, slopes, strict=True):
        if slope is not None:
            wide = slope.to(t.dtype)
            t.addcmul_(wide, wide)
