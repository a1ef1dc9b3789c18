"""Methods that weigh the plain gradient against the perturbed one: gradient-norm regularization, the surrogate gap."""

from __future__ import annotations

from dataclasses import replace

from .. import checks
from ..method import Method, recipe
from ..parts import Always, Amplified, FollowLR, LossFirst, Orthogonal, Second
from .sam import ascent, with_combine


@recipe
def gnr(rho: float | Method = 0.05, strength: float = 1.0) -> Method:
    """Gradient-norm regularization: minimize L + γ‖∇L‖ by two gradients.

    d = (1 − γ/ρ) g₀ + (γ/ρ) g₁, with SAM's ε; γ/ρ = 1 is SAM.

    The authors' code can mix g₀/‖g₀‖ in instead of g₀; that is another formula, and not this one.

    Args:
        rho: radius of SAM's ball, or a method whose ε is taken. Default 0.05.
        strength: γ/ρ. Default 1.

    Raises:
        ValueError: if strength is not finite, or the method given combines in its own way.

    Cost:
        2 propagations.

    Source:
        Zhao et al. 2022; eq. 6 in RST (2022).
    """
    return with_combine("gnr", ascent(rho), Amplified(Second(), strength))


@recipe
def gsam(rho: float | Method = 0.05, alpha: float = 0.4, rho_min: float | None = None, lr_min: float = 0.0) -> Method:
    """Surrogate-gap guided SAM: descend the perturbed loss and, where that costs nothing, the gap to the plain one.

    d = g₁ − α g₀⊥, g₀⊥ = g₀ − (g₀ᵀĝ₁)ĝ₁, with SAM's ε;  ρ_t = ρmin + (ρmax − ρmin)(lr_t − lr_min)/(lr_max − lr_min).

    lr_max is the first group's ``max_lr`` or ``initial_lr`` as torch's schedulers leave it, the current rate where
    there is none; above it, where ``CyclicLR`` goes, ρ stays ρmax.

    Args:
        rho: ρmax, radius of SAM's ball, or a method whose ε is taken. Default 0.05.
        alpha: α, weight of the ascent across g₁; 0 is SAM. Default 0.4.
        rho_min: ρmin, radius where the learning rate is lowest; None for a constant radius.
        lr_min: the schedule's lowest learning rate. Default 0.

    Raises:
        ValueError: if alpha is not finite, lr_min < 0, rho_min > rho, or the method given combines in its own way, or
            has a ρ of its own beside rho_min.

    Cost:
        2 propagations.

    Source:
        Zhuang et al. 2022 (GSAM), algorithm 1.
    """
    checks.non_negative(lr_min=lr_min)
    method = with_combine("gsam", ascent(rho), Orthogonal(alpha))
    if rho_min is None:
        return method
    if not isinstance(method.when, Always):
        raise ValueError(
            f"rho_min={rho_min!r} lets ρ follow the learning rate, but {rho!r} sets its own: {method.when!r}"
        )
    return replace(method, when=FollowLR(method.when.rho, rho_min, lr_min))


@recipe
def gsam_min(rho: float | Method = 0.05, alpha: float = 0.4) -> Method:
    """GSAM's min(f, h): descend the plain loss and, where that costs nothing, the perturbed one.

    d = g₀ + α (g₁ − (g₁ᵀĝ₀)ĝ₀), with SAM's ε.

    Args:
        rho: radius of SAM's ball, or a method whose ε is taken. Default 0.05.
        alpha: α, weight of the descent across g₀. Default 0.4.

    Raises:
        ValueError: if alpha is not finite, or the method given combines in its own way.

    Cost:
        2 propagations.

    Source:
        Zhuang et al. 2022, section 6.4, min(f, h).
    """
    return with_combine("gsam_min", ascent(rho), LossFirst(alpha))


@recipe
def gsam_penalty(rho: float | Method = 0.05, lam: float = 0.4) -> Method:
    """The surrogate gap as a penalty: minimize f_p + λh.

    d = g₁ + λ (g₁ − g₀), with SAM's ε.

    Args:
        rho: radius of SAM's ball, or a method whose ε is taken. Default 0.05.
        lam: λ; 0 is SAM. Default 0.4, as GSAM's α: the paper tunes λ and states none.

    Raises:
        ValueError: if lam is not finite, or the method given combines in its own way.

    Cost:
        2 propagations.

    Source:
        Zhuang et al. 2022, section 6.4 and table 2, min(f_p + λh).
    """
    checks.finite(lam=lam)
    return with_combine("gsam_penalty", ascent(rho), Amplified(Second(), 1 + lam))
