"""How far the loss is from linear along the ascent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import checks
from .axes import histogram
from .objective import Objective
from .part import Part, estimate, finite, gathered
from .sharpness import ascent

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Linearity:
    """What `linearity` found."""

    rho: float
    beta: float
    zeta: float
    """Weighted mean over the batches; the smaller, the more linear."""
    error: float
    """Its standard error, from the spread over the batches; NaN for a single batch."""
    values: Tensor
    """ζ of each batch, float64 on the CPU, shape (batches,)."""
    passes: float

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw a histogram of the batches' ζ, with their mean."""
        axes = histogram(self.values, self.zeta, self.error, axes)
        axes.set_xlabel(f"ζ, distance of the loss from linear, ρ = {self.rho:g}")
        axes.set_ylabel("batches")
        return axes


def linearity(
    objective: Objective,
    rho: float = 0.05,
    *,
    beta: float = 1.0,
    seed: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> Linearity:
    """Measure how far the loss of a batch is from linear along its ascent ε.

    ``ζ = |L_B(w+ε) − L_B(w) − εᵀ∇L_B(w)|``, on average over the batches, weighted by examples. ε is SAM's,
    ``ρ g/‖g‖``; with β < 1 it is ESAM's, ``(ρ/β) g/‖g‖`` over the parameter tensors picked with probability β each,
    anew for every batch, and 0 for the others.

    Args:
        objective: the mean loss.
        rho: radius ρ ≥ 0.
        beta: share β of the parameter tensors, in (0, 1].
        seed: of the picks.
        progress: is told the share done.

    Raises:
        ValueError: if ρ or β is out of range, or a loss is not finite.

    Cost:
        4/3.

    Source:
        Du et al. 2022, "Efficient sharpness-aware minimization for improved training of neural networks", section
        A.3.
    """
    checks.non_negative(rho=rho)
    checks.share(beta=beta)
    found: list[tuple[float, float]] = []
    with objective.still():
        before, done, examples = objective.passes, 0, objective.examples
        with objective.moved() as move:
            for i, batch in enumerate(objective.batches()):
                part = Part(objective, batch)
                move()
                losses, gradient = part.gradient()
                generator = objective.generator(seed, f"swp {objective.rank} {i}")
                epsilon = ascent(_picked(objective, gradient, beta, generator), rho / beta)
                move((1.0, epsilon))
                rise = finite(part.loss(finite=False), rho=rho) - part.mean(losses)
                found.append((abs(rise - float(epsilon @ gradient)), part.weight))
                done += part.size
                progress(done / examples)
    values, weights = torch.tensor(gathered(objective, found), dtype=torch.float64).unbind(1)
    mean, error = estimate(values, weights)
    return Linearity(rho, beta, float(mean), float(error), values, objective.passes - before)


def _picked(objective: Objective, gradient: Tensor, beta: float, generator: torch.Generator) -> Tensor:
    """Return the gradient of the tensors that are picked, and 0 for the others."""
    draws = torch.rand(len(objective.params), generator=generator, device=objective.device)
    parts = torch.split(gradient, [p.numel() for p in objective.params])
    return torch.cat([part * (draw < beta) for part, draw in zip(parts, draws, strict=True)])
