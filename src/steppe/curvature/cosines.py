"""How well the gradient of a part of a batch stands for the batch's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import checks
from ..parts.select import Sharpest
from .axes import given_or_new
from .objective import Objective
from .part import Part, estimate, finite, gathered
from .sharpness import ascent

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Cosines:
    """What `cosines` found: cosines with the gradient of the whole batch, all at w + ε."""

    rho: float
    gamma: float
    sharpest: float
    """Of B⁺, the examples whose loss rises the most; weighted mean over the batches."""
    flattest: float
    """Of B⁻, as many examples whose loss rises the least."""
    random: float
    """Of as many examples drawn at random."""
    errors: tuple[float, float, float]
    """Standard errors of the three, in this order, from the spread over the batches; NaN for a single batch."""
    values: Tensor
    """The three of each batch, float64 on the CPU, shape (batches, 3)."""
    passes: float

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the three means with their standard errors."""
        axes = given_or_new(axes)
        axes.errorbar(range(3), [self.sharpest, self.flattest, self.random], yerr=self.errors, fmt="o", capsize=3)
        axes.set_xticks(range(3), ["B⁺", "B⁻", "random"])
        axes.set_xlabel(f"subset of the batch, γ = {self.gamma:g}")
        axes.set_ylabel("cosine with the batch's gradient")
        return axes


def cosines(
    objective: Objective,
    rho: float = 0.05,
    *,
    gamma: float = 0.5,
    seed: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> Cosines:
    """Measure the cosines of the gradients of B⁺, B⁻ and a random subset with that of their batch B.

    ``cos(∇L_S(w+ε), ∇L_B(w+ε))`` with SAM's ε of the batch. B⁺ are the ``⌊γB⌋`` examples of largest
    ``ℓᵢ(w+ε) − ℓᵢ(w)``, B⁻ as many of the smallest; the random subset has their size too. Means over batches are
    weighted by examples; batches with ``⌊γB⌋ = 0`` are left out.

    Args:
        objective: the mean loss; its ``loss_fn`` must return the loss of each example.
        rho: radius ρ > 0.
        gamma: share γ of the batch in a subset, in (0, 1/2], so that B⁺ and B⁻ are disjoint; default 1/2, the paper's.
        seed: of the random subsets.
        progress: is told the share done.

    Raises:
        ValueError: if ρ or γ is out of range, every batch is too small, or a loss is not finite.

    Cost:
        2 + 3γ.

    Source:
        Du et al. 2022, "Efficient sharpness-aware minimization for improved training of neural networks", section
        A.2.
    """
    checks.positive(rho=rho)
    if not 0 < gamma <= 0.5:
        raise ValueError(f"gamma={gamma!r} must lie in (0, 0.5]: B⁺ and B⁻ must not overlap")
    found: list[tuple[list[float], float]] = []
    with objective.still():
        before, done, examples = objective.passes, 0, objective.examples
        with objective.moved() as move:
            for i, batch in enumerate(objective.batches()):
                part = Part(objective, batch, per_example=True)
                if int(gamma * part.size):
                    generator = objective.generator(seed, f"subset {objective.rank} {i}")
                    found.append((_of_batch(part, move, rho, gamma, generator), part.weight))
                done += part.size
                progress(done / examples)
    every = gathered(objective, found)
    if not every:
        raise ValueError(f"gamma={gamma!r} of a batch is less than one example in every batch: give larger batches")
    values = torch.tensor([three for three, _ in every], dtype=torch.float64)
    mean, error = estimate(values, torch.tensor([weight for _, weight in every], dtype=torch.float64))
    sharpest, flattest, random = mean.tolist()
    first, second, third = error.tolist()
    errors = (first, second, third)
    return Cosines(rho, gamma, sharpest, flattest, random, errors, values, objective.passes - before)


def _of_batch(
    part: Part, move: Callable[..., None], rho: float, gamma: float, generator: torch.Generator
) -> list[float]:
    """Return the three cosines of one batch."""
    move()
    before, gradient = part.gradient()
    move((1.0, ascent(gradient, rho)))
    after, whole = part.gradient(finite=False)
    finite(part.mean(after), rho=rho)
    rise = after - before
    choose = Sharpest(gamma)
    drawn = torch.randperm(part.size, generator=generator, device=generator.device)[: choose.count(part.size)]
    subsets = choose(rise), choose(-rise), drawn
    return [_cosine(part.rows(rows.to(part.device)).gradient()[1], whole) for rows in subsets]


def _cosine(u: Tensor, v: Tensor) -> float:
    """Return the cosine of two vectors; 0 where one of them is 0."""
    return float(ascent(u, 1.0) @ ascent(v, 1.0))
