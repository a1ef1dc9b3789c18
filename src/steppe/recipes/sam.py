"""SAM and its close kin: the ball's norm, inner steps, the second-order term, groups of examples, adaptive balls."""

from __future__ import annotations

from dataclasses import replace

from .. import checks
from ..method import Method, recipe
from ..parts import Adaptive, Always, Ascent, Mix, Second, SecondOrder
from ..point import Combine


@recipe
def sgd() -> Method:
    """The base optimizer alone: the method that does nothing.

    d = g₀

    Cost:
        1 propagation.

    Source:
        The baseline of every paper.
    """
    return Method(Always(0.0), Ascent(), Second())


@recipe
def sam(rho: float = 0.05, p: float = 2.0, steps: int = 1, second_order: bool = False) -> Method:
    """Sharpness-aware minimization: descend along the gradient at the worst point of a ball around the weights.

    ε = ρ·sign(g₀)|g₀|^(q−1) / ‖g₀‖_q^(q/p), 1/p + 1/q = 1 (p = 2: ρ g₀/‖g₀‖; p = ∞: ρ sign(g₀));  d = g₁.
    K inner steps: ε ← ε + (ρ/K)·(ascent of length 1 at w + ε); a path of K pieces of length ρ/K never leaves the
    ball, so the projection onto it is the identity. Second-order term: d = g₁ + (ρ/‖g₀‖) H(w) (g₁ − ĝ₀(ĝ₀ᵀg₁)).

    Args:
        rho: radius of the ball in units of the weights. Default 0.05.
        p: norm of the ball, > 1; ``math.inf`` included. Default 2.
        steps: K, number of inner steps. Default 1.
        second_order: keep the term that differentiates ε; p = 2 and K = 1 only. Default False.

    Raises:
        ValueError: if rho < 0, p ≤ 1, steps < 1, or second_order with p ≠ 2 or K ≠ 1.

    Cost:
        1 + K propagations; the second-order term adds a Hessian-vector product (3).

    Source:
        Foret et al. 2021, eq. 2; appendices C.4 (second order), C.5 (p), C.6 (inner steps).
    """
    checks.flag(second_order=second_order)
    return Method(Always(rho), Ascent(p, steps), SecondOrder() if second_order else Second())


@recipe
def asam(rho: float = 0.5, eta: float = 0.01, by_name: bool = False) -> Method:
    """Adaptive SAM: a ball that scales with the weights, so that rescaling a layer does not change the sharpness.

    ε = ρ T²g₀/‖T g₀‖, T = |w| + η on adaptive tensors, 1 on the others;  d = g₁.

    Args:
        rho: radius of the ball, without unit. Default 0.5.
        eta: η, what keeps T away from 0, in units of the weights. Default 0.01.
        by_name: False: tensors of two dimensions and more are adaptive. True: those with "weight" in their name, so the
            scales of normalisation layers too, as in the authors' code. Default False.

    Raises:
        ValueError: if rho < 0 or eta < 0.

    Cost:
        2 propagations.

    Source:
        Kwon et al. 2021, "ASAM: adaptive sharpness-aware minimization".
    """
    return Method(Always(rho), Adaptive(eta, by_name), Second())


@recipe
def mixed_sam(rho: float | Method = 0.05, alpha: float = 0.2) -> Method:
    """SAM that keeps a share of the plain gradient.

    d = α g₀ + (1 − α) g₁, with SAM's ε.

    Args:
        rho: radius of SAM's ball, or a method whose ε is taken. Default 0.05.
        alpha: α, share of the plain gradient, in [0, 1]; 0 is SAM. Default 0.2.

    Raises:
        ValueError: if alpha lies outside [0, 1], or the method given combines in its own way.

    Cost:
        2 propagations.

    Source:
        Li et al. 2022 (RWP), section 4.7.
    """
    return with_combine("mixed_sam", ascent(rho), Mix(alpha))


@recipe
def m_sharpness(method: Method, m: int) -> Method:
    """Any method on groups of m examples, each with its own ε and its own gradients.

    d = Σ_groups (m_group/B) d_group

    Running statistics of normalisation layers see the first group only, as those of the first rank survive under data
    parallelism.

    Args:
        method: the method that runs on each group.
        m: examples in a group; the last group may be smaller.

    Raises:
        ValueError: if m < 1, or the method keeps a memory or takes another batch for pass two.
        TypeError: if the first argument is no method.

    Cost:
        As the method.

    Source:
        Foret et al. 2021, section 4.1.
    """
    if not isinstance(method, Method):
        raise TypeError(f"the method of the groups is {method!r}: give a recipe, as in m_sharpness(sam(), m=32)")
    checks.count(m=m)
    if method.m is not None:
        raise ValueError(f"m={m!r}, but {method!r} is cut into groups already: give m once")
    return replace(method, m=m)


def ascent(rho: float | Method) -> Method:
    """Return SAM of that radius, or the method given in its place."""
    return rho if isinstance(rho, Method) else sam(rho)


def with_combine(name: str, method: Method, combine: Combine) -> Method:
    """Return the method with another combination, where it has none of its own."""
    if not isinstance(method.combine, Second):
        raise ValueError(f"{name} sets how the gradients are combined, but {method!r} combines by {method.combine!r}")
    return replace(method, combine=combine)
