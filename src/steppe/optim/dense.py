"""The whole Fisher matrix of a small model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import vec
from ..batch import Batch
from ..curvature.objective import Objective
from ..curvature.operator import Operator
from ..curvature.products import Likelihood
from ..curvature.still import Mode
from ..examples import to_float32
from ..rounding import is_low, widened
from ..vec import Vec

LARGEST = 5_000
"""Weights of a model whose whole matrix is formed, and inverted in k³/3 operations."""


class Dense:
    """All parameters as one block: ``F + diag(λ) = L Lᵀ`` by Cholesky.

    Args:
        params: The parameters, in the model's order.
        group_of: The parameter group of a parameter, whose damping holds for its entries.

    Raises:
        ValueError: If there are too many weights.
    """

    name = "the model"

    def __init__(self, params: Vec, group_of: Callable[[Tensor], dict[str, Any]]) -> None:
        size = sum(p.numel() for p in params)
        if size > LARGEST:
            raise ValueError(f'the whole Fisher matrix of {size} weights is too large, {LARGEST} are the limit: take '
                             'fisher="kfac" or "diagonal"')  # fmt: skip
        self.params, self._group_of, self._size = params, group_of, size
        self.is_exact = False

    def price(self) -> float:
        """The cube of the number of weights."""
        return float(self._size) ** 3

    def invert(self, state: dict[str, Tensor], damping: float) -> dict[str, Tensor]:
        """Factorise the matrix, each group's damping on its own entries; ``damping`` is the first one's."""
        F = state["fisher"]
        entries = [F.new_full((p.numel(),), self._group_of(p)["damping"]) for p in self.params]
        L, failed = torch.linalg.cholesky_ex(F + torch.cat(entries).diag())
        if failed or not bool(L.isfinite().all()):
            raise ValueError(f"the Fisher matrix of {self.name} is singular to rounding with damping={damping:g}: "
                             "choose a larger damping, or float64")  # fmt: skip
        return {"cholesky": L}

    def solve(self, state: dict[str, Tensor], gradients: Vec, damping: float) -> Vec:
        """``(L Lᵀ)⁻¹ g``, with the damping of the last inversion."""
        g = vec.join(gradients).to(state["cholesky"])
        return vec.split(torch.cholesky_solve(g[:, None], state["cholesky"])[:, 0], gradients)

    def quadratic(self, state: dict[str, Tensor], d: Vec) -> Tensor:
        """``dᵀ F d``."""
        flat = vec.join(d).to(state["fisher"])
        return flat @ (state["fisher"] @ flat)


def fisher(
    batch: Batch,
    params: Vec,
    kind: str,
    losses: Tensor,
    rows: Tensor | None,
    likelihood: Likelihood,
    draws: int | None,
    seed: int,
) -> tuple[Tensor, float]:
    """Return the Fisher matrix of this rank's examples at the model's present weights, and its cost in propagations.

    Args:
        batch: the examples.
        params: parameters of the model, in its order.
        kind: ``"exact"`` expectation over labels, ``"mc"``: drawn ones, ``"empirical"``: those of the data.
        losses: of the examples; where one is not finite, neither is the matrix.
        rows: examples to take; None for all.
        likelihood: what the outputs mean.
        draws: of labels, for ``"mc"``.
        seed: of the draws.

    Returns:
        A symmetric matrix, at least float32, of shape (k, k) for k weights.

    Raises:
        ValueError: if the loss is not twice differentiable.

    Cost:
        1 + 4k/3 propagations.
    """
    model, autocast = batch.model, None if is_low(params) else batch.autocast
    with widened(model.parameters(), model.buffers()):
        parts = [to_float32(data) if autocast is None else data for data, _ in batch.chunks(rows)]
        mode: Mode = "train" if model.training else "eval"
        objective = Objective(model, batch.loss_fn, parts, params=params, mode=mode, autocast=autocast)
        objective.group = None  # ranks share their means, as they do their gradients
        ones = torch.eye(objective.size, dtype=objective.dtype, device=objective.device)
        if not bool(losses.isfinite().all()):
            return ones * math.nan, 0.0
        matrix = Operator(
            objective,
            "empirical" if kind == "empirical" else "fisher",
            draws=draws if kind == "mc" else None,
            likelihood=likelihood,
            seed=seed,
        )
        found = matrix @ ones
        matrix.release()
        return (found + found.T) / 2, objective.passes
