"""How much the loss rises in the worst direction within a ball."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import checks, vec
from ..examples import extent
from .axes import given_or_new, histogram
from .objective import Objective
from .part import Part, estimate, finite, gathered

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class SurrogateGap:
    """What `surrogate_gap` found."""

    rho: float
    steps: int
    loss: float
    """L(w)."""
    gap: float
    """h = L(w+ε) − L(w)."""
    slope: float
    """εᵀ∇L(w), the part of h that is of first order; 0 at a minimum."""
    sharpness: float
    """2h/ρ², at a minimum ≈ λmax; NaN for ρ = 0."""
    curvature: float
    """2(h − εᵀ∇L)/‖ε‖², the curvature along ε, so at most λmax to leading order; NaN for ε = 0."""
    passes: float

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the loss at w and at w + ε with the tangent at w: what of the gap is slope, and what is curvature."""
        axes = given_or_new(axes)
        tangent, end = self.loss + self.slope, self.loss + self.gap
        axes.plot([0, 1], [self.loss, tangent], linestyle="--", color="C0", label=f"slope: {self.slope:.3g}")
        axes.vlines(1, tangent, end, color="C1", label=f"curvature: {self.gap - self.slope:.3g}")
        axes.plot([0, 1], [self.loss, end], "o", color="black", label=f"gap: {self.gap:.3g}")
        axes.set_xticks([0, 1], ["w", "w + ε"])
        axes.set_xlabel(f"along the ascent, ρ = {self.rho:g}")
        axes.set_ylabel("loss")
        axes.legend()
        return axes


@dataclass(frozen=True)
class MSharpness:
    """What `m_sharpness` found."""

    rho: float
    m: int
    steps: int
    sharpness: float
    """Weighted mean over the groups."""
    error: float
    """Its standard error, from the spread over the groups; NaN for a single group."""
    values: Tensor
    """The rise of each group, float64 on the CPU, shape (groups,)."""
    passes: float

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw a histogram of the groups' rises, with their mean."""
        axes = histogram(self.values, self.sharpness, self.error, axes)
        axes.set_xlabel(f"rise of a group's loss, ρ = {self.rho:g}")
        axes.set_ylabel(f"groups of {self.m}")
        return axes


def surrogate_gap(
    objective: Objective,
    rho: float = 0.05,
    *,
    steps: int = 1,
    progress: Callable[[float], None] = lambda share: None,
) -> SurrogateGap:
    """Measure how much the loss over the whole data rises along its ascent ε.

    ``h = L(w+ε) − L(w)``, and ``σmax ≈ 2h/ρ²`` at a minimum. ε is found as in `m_sharpness`; with one step it is SAM's,
    ``ρ ∇L/‖∇L‖``. Away from a minimum ``h = εᵀ∇L + ½εᵀHε + O(ρ³)``, and 2h/ρ² is mostly the slope; the result has the
    slope, and the curvature without it, too.

    Args:
        objective: the mean loss.
        rho: radius ρ ≥ 0.
        steps: of the ascent; one gives the Rayleigh quotient of the gradient, many that of the worst direction, λmax.
        progress: is told the share done.

    Raises:
        ValueError: if ρ < 0, steps < 1, or a loss is not finite.

    Cost:
        steps + 2/3.

    Source:
        Zhuang et al. 2022, "Surrogate gap minimization improves sharpness-aware training", equation 4 and lemma 3.3.
    """
    checks.non_negative(rho=rho)
    checks.count(steps=steps)
    before, total = objective.passes, steps + 2 / 3
    with objective.still(), objective.moved() as move:
        loss = float(objective.loss())
        gradient = uphill = objective.gradient()
        epsilon = torch.zeros_like(gradient)
        for step in range(steps):
            epsilon = _climb(epsilon, uphill, rho)
            move((1.0, epsilon))
            progress((step + 4 / 3) / total)
            if step + 1 < steps:
                uphill = objective.gradient()
        gap = finite(float(objective.loss(finite=False)), rho=rho) - loss
    progress(1.0)
    slope, square = float(epsilon @ gradient), float(epsilon @ epsilon)
    return SurrogateGap(
        rho=rho,
        steps=steps,
        loss=loss,
        gap=gap,
        slope=slope,
        sharpness=2 * gap / rho**2 if rho else math.nan,
        curvature=2 * (gap - slope) / square if square else math.nan,
        passes=objective.passes - before,
    )


def m_sharpness(
    objective: Objective,
    rho: float,
    m: int,
    *,
    steps: int = 1,
    progress: Callable[[float], None] = lambda share: None,
) -> MSharpness:
    """Measure how much the loss of m examples rises in its own worst direction, on average over groups of m.

    ``mean_G max_{‖ε‖≤ρ} L_G(w+ε) − L_G(w)``. The maximum is sought by projected ascent,
    ``ε ← Π(ε + ρ ∇L_G(w+ε)/‖·‖)`` from ``ε = 0``, with Π onto the ball; it is the largest loss met, so never above the
    true maximum, and more steps never give less. One step is SAM's. On a convex quadratic the steps converge to the
    exact maximum.

    A group is m consecutive examples of a batch of the loader, the last of a batch maybe fewer; the mean is weighted
    by examples.

    Args:
        objective: the mean loss.
        rho: radius ρ ≥ 0.
        m: examples in a group, at most a batch.
        steps: of the ascent.
        progress: is told the share done.

    Raises:
        ValueError: if ρ < 0, m < 1, m is larger than every batch, steps < 1, or a loss is not finite.

    Cost:
        steps + 1/3.

    Source:
        Foret et al. 2021, "Sharpness-aware minimization for efficiently improving generalization", sections 4.1 and
        C.6.
    """
    checks.non_negative(rho=rho)
    checks.count(m=m, steps=steps)
    found: list[tuple[float, float]] = []
    with objective.still():
        sizes = [extent(batch)[0] for batch in objective.batches()]
        if m > max(gathered(objective, sizes)):
            raise ValueError(f"m={m} is more than a batch of the loader holds, {max(sizes)}: give larger batches")
        before, done = objective.passes, 0
        with objective.moved() as move:
            for batch in objective.batches():
                for group in Part(objective, batch).groups(m):
                    rise = _rise(group, move, rho, steps)
                    found.append((rise, group.weight))
                    done += group.size
                    progress(done / sum(sizes))
    values, weights = torch.tensor(gathered(objective, found), dtype=torch.float64).unbind(1)
    mean, error = estimate(values, weights)
    return MSharpness(rho, m, steps, float(mean), float(error), values, objective.passes - before)


def ascent(gradient: Tensor, rho: float) -> Tensor:
    """Return SAM's ``ε = ρ g/‖g‖``; 0 where g is."""
    return gradient * vec.over(rho, vec.norm([gradient]))


def _climb(epsilon: Tensor, gradient: Tensor, rho: float) -> Tensor:
    """Return where a step of length ρ along the gradient leads within the ball."""
    there = epsilon + ascent(gradient, rho)
    norm = float(vec.norm([there]))
    return there * (rho / norm) if norm > rho else there


def _rise(part: Part, move: Callable[..., None], rho: float, steps: int) -> float:
    """Return the largest rise of a part's loss along a projected ascent."""
    move()
    losses, gradient = part.gradient()
    start, best = part.mean(losses), -math.inf
    epsilon = torch.zeros_like(gradient)
    for step in range(steps):
        epsilon = _climb(epsilon, gradient, rho)
        move((1.0, epsilon))
        if step + 1 < steps:
            losses, gradient = part.gradient(finite=False)
            loss = part.mean(losses)
        else:
            loss = part.loss(finite=False)
        best = max(best, finite(loss, rho=rho) - start)
    return best
