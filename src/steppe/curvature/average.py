"""How much the loss rises on average around the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Generator, Tensor

from .. import checks, vec
from ..vec import Vec
from .axes import histogram
from .objective import Objective
from .part import finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Noise: TypeAlias = Literal["gaussian", "filter"]


@dataclass(frozen=True)
class AverageSharpness:
    """What `average_sharpness` found."""

    noise: Noise
    deviation: float
    draws: int
    loss: float
    """L(w)."""
    sharpness: float
    """Mean over the draws."""
    error: float
    """Its standard error; NaN for a single draw."""
    values: Tensor
    """The rise of each draw, float64 on the CPU, shape (draws,)."""
    passes: float

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw a histogram of the draws' rises, with their mean."""
        axes = histogram(self.values, self.sharpness, self.error, axes)
        kind, symbol = ("filter-wise", "γ") if self.noise == "filter" else ("Gaussian", "σ")
        axes.set_xlabel(f"rise of the loss under {kind} noise, {symbol} = {self.deviation:g}")
        axes.set_ylabel("draws")
        return axes


def average_sharpness(
    objective: Objective,
    noise: Noise = "filter",
    deviation: float = 0.01,
    *,
    draws: int = 10,
    seed: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> AverageSharpness:
    """Measure how much Gaussian noise on the weights raises the loss, in expectation.

    ``E[L(w+ε)] − L(w)``, where each draw is the mean over ε and −ε: what is odd in ε, the slope, vanishes in the
    expectation, and so it does in every draw. For a quadratic and isotropic noise this is ``½σ² tr H``.

    Args:
        objective: the mean loss.
        noise: ``"gaussian"``: ``εᵢ ~ N(0, σ²)``; ``"filter"``: ``ε_k ~ N(0, γ²‖w_k‖² I)`` for each filter k, as in RWP:
            a slice along dimension 0, or the whole of a tensor of one dimension.
        deviation: σ, or γ; at least 0.
        draws: of ε.
        seed: of the draws.
        progress: is told the share done.

    Raises:
        ValueError: if the deviation is negative, draws < 1, or a loss is not finite.

    Cost:
        1/3 + 2/3 for each draw.

    Source:
        Li et al. 2022, "Efficient generalization improvement guided by random weight perturbation",
        section 3.2.
    """
    checks.one_of(noise=(noise, ("gaussian", "filter")))
    checks.non_negative(deviation=deviation)
    checks.count(draws=draws)
    before, values = objective.passes, []
    with objective.still():
        loss = float(objective.loss())
        progress(1 / (2 * draws + 1))
        sizes = vec.filter_norms([p.detach() for p in objective.params]) if noise == "filter" else None
        with objective.moved() as move:
            for draw in range(draws):
                epsilon = _draw(objective, sizes, objective.generator(seed, f"noise {draw}"))
                rises = []
                for sign in (1, -1):
                    move((sign * deviation, epsilon))
                    rises.append(finite(float(objective.loss(finite=False)), deviation=deviation) - loss)
                values.append(sum(rises) / 2)
                progress((2 * draw + 3) / (2 * draws + 1))
    each = torch.tensor(values, dtype=torch.float64)
    error = float(each.std()) / draws**0.5 if draws > 1 else math.nan
    return AverageSharpness(noise, deviation, draws, loss, float(each.mean()), error, each, objective.passes - before)


def _draw(objective: Objective, sizes: Vec | None, generator: Generator) -> Vec:
    """Return standard normal noise, times the filters' norms if there are ``sizes``."""
    flat = torch.randn(objective.size, dtype=objective.dtype, device=objective.device, generator=generator)
    noise = objective.split(flat)
    if sizes is not None:
        vec.mul_(noise, sizes)
    return noise
