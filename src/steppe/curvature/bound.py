"""The PAC-Bayes bound on the loss of the whole distribution."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import checks, vec
from .axes import given_or_new
from .objective import Objective
from .part import gathered
from .sharpness import surrogate_gap

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Bound:
    """What `pac_bayes` found."""

    rho: float
    delta: float
    examples: int
    """n."""
    parameters: int
    """k."""
    norm: float
    """‖w‖."""
    perturbed: float
    """L_S(w+ε)."""
    complexity: float
    """The square root."""
    bound: float
    """Their sum."""
    vacuous: bool
    """Whether the bound is at least 1: then it says nothing about a loss in [0, 1]."""
    passes: float

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the two parts of the bound one upon the other, with a line where it becomes vacuous."""
        axes = given_or_new(axes)
        axes.bar(f"ρ = {self.rho:g}", self.perturbed, color="C0", label="loss at w + ε")
        axes.bar(f"ρ = {self.rho:g}", self.complexity, bottom=self.perturbed, color="C1", label="complexity")
        axes.axhline(1, color="black", linestyle="--", label="vacuous from here")
        axes.set_ylabel(f"bound on the loss, with probability {100 * (1 - self.delta):g} %")
        axes.legend()
        return axes


def pac_bayes(
    objective: Objective,
    rho: float = 0.05,
    *,
    delta: float = 0.05,
    progress: Callable[[float], None] = lambda share: None,
) -> Bound:
    """Evaluate SAM's bound on the loss over the distribution that the n examples were drawn from.

    With probability 1 − δ, and k weights,

    ``L_D(w) ≤ max_{‖ε‖≤ρ} L_S(w+ε) + √((C + 4 log(n/δ) + 8 log(6n + 3k)) / (n − 1))``,
    ``C = k log(1 + ‖w‖²/ρ² (1 + √(log(n)/k))²)``;

    the last logarithm is the theorem's Õ(1), as its proof ends. For a network of more weights than examples the bound
    is vacuous, and the result says so.

    Three things the number rests on. The theorem is about a loss in [0, 1]: it is not proved for the cross-entropy,
    which has no such limit. The maximum is that of SAM's ascent, a lower estimate. And noise of this size on the
    weights must not lower the loss over the distribution.

    Args:
        objective: the mean loss over the training data, with weights 1; k counts its parameters, and any others must
            not have been trained on these data.
        rho: radius ρ > 0.
        delta: δ in (0, 1).
        progress: is told the share done.

    Raises:
        ValueError: if ρ or δ is out of range, there are fewer than 2 examples, examples are weighted, or a loss is not
            finite.

    Cost:
        5/3.

    Source:
        Foret et al. 2021, "Sharpness-aware minimization for efficiently improving generalization", theorem 2 and the
        end of its proof.
    """
    checks.positive(rho=rho)
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta!r} must lie in (0, 1)")
    if objective.weights is not None:
        raise ValueError("the bound is about the plain mean over the examples: give an objective without weights")
    gap = surrogate_gap(objective, rho, progress=progress)
    n, k = sum(gathered(objective, [objective.examples])), objective.size
    if n < 2:
        raise ValueError("the bound needs at least 2 examples")
    norm = float(vec.norm([p.detach() for p in objective.params]))
    spread = k * math.log1p((norm / rho * (1 + math.sqrt(math.log(n) / k))) ** 2)
    complexity = math.sqrt((spread + 4 * math.log(n / delta) + 8 * math.log(6 * n + 3 * k)) / (n - 1))
    perturbed = gap.loss + gap.gap
    bound = perturbed + complexity
    return Bound(rho, delta, n, k, norm, perturbed, complexity, bound, bound >= 1, gap.passes)
