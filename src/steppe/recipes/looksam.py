"""LookSAM."""

from __future__ import annotations

from dataclasses import replace

from ..method import Method, recipe
from ..parts import Every, Look
from .sam import ascent, with_combine


@recipe
def looksam(rho: float | Method = 0.05, alpha: float = 0.7, k: int = 5) -> Method:
    """LookSAM: perturb on every k-th step only, and reuse what it found on the steps between.

    t mod k = 0: keep g_v = g₁ − (g₁ᵀĝ₀)ĝ₀, d = g₁;  else d = g₀ + α (‖g₀‖/‖g_v‖) g_v, norms over all parameters.

    Args:
        rho: radius of SAM's ball, or a method whose ε is taken. Default 0.05.
        alpha: α, length of the reused part in units of ‖g₀‖. Default 0.7.
        k: period of the sharp steps. Default 5.

    Raises:
        ValueError: if k < 1, alpha is not finite, or the method given combines in its own way or needs a mask on pass
            one.

    Cost:
        1 + 1/k propagations; 1.2 at the defaults. One copy of the weights is kept between steps.

    Source:
        Liu et al. 2022, "Towards efficient and scalable sharpness-aware minimization" (LookSAM).
    """
    method = with_combine("looksam", ascent(rho), Look(alpha))
    return replace(method, when=Every(method.when, k))
