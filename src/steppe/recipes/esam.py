"""Efficient SAM: fewer weight gradients in pass one, fewer examples in pass two."""

from __future__ import annotations

from dataclasses import replace

from .. import checks
from ..method import Method, recipe
from ..parts import Masked, Sharpest
from .sam import ascent


@recipe
def esam(rho: float | Method = 0.05, beta: float = 0.6, gamma: float = 0.5) -> Method:
    """Efficient SAM: perturb a random part of the weights, and descend on the examples that this hurts most.

    ε = (ρ/β) g₀/‖g₀‖ on tensors picked with probability β, 0 elsewhere; B' = the max(1, ⌊γB⌋) examples of largest
    ℓᵢ(w + ε) − ℓᵢ(w);  d = g₁ on B'.

    The norm is over the picked tensors, and exactly ⌊γB⌋ examples are kept; the authors' code drops one to ``>``. Their
    algorithm 1 leaves out the normalisation of ε that their code and SAM have.

    Args:
        rho: radius of SAM's ball, or a method whose ε is taken, as in ``esam(asam())``. Default 0.05.
        beta: β, probability that a tensor is picked, in (0, 1]. Default 0.6; the paper takes 0.5 on Wide ResNets and
            ViT.
        gamma: γ, share of the batch that pass two sees, in (0, 1]. Default 0.5; the paper takes 0.7 on ImageNet.

    Raises:
        ValueError: if beta or gamma lies outside (0, 1], or the method given needs all of g₀ or selects examples
            itself.

    Cost:
        1 − (1 − β)/3 + 1/3 + γ propagations; 1.70 at the defaults.

    Source:
        Du et al. 2022 (ESAM), algorithm 1, eq. 6.
    """
    return _selected(_masked(ascent(rho), beta), gamma)


@recipe
def esam_swp(rho: float | Method = 0.05, beta: float = 0.6) -> Method:
    """Stochastic weight perturbation alone: SAM that perturbs a random part of the tensors.

    ε = (ρ/β) g₀/‖g₀‖ on tensors picked with probability β, 0 elsewhere;  d = g₁.

    Args:
        rho: radius of SAM's ball, or a method whose ε is taken. Default 0.05.
        beta: β, probability that a tensor is picked, in (0, 1]. Default 0.6.

    Raises:
        ValueError: if beta lies outside (0, 1], or the method given needs all of g₀.

    Cost:
        2 − (1 − β)/3 propagations; 1.87 at the defaults.

    Source:
        Du et al. 2022 (ESAM), section 2.2, eq. 6.
    """
    return _masked(ascent(rho), beta)


@recipe
def esam_sds(rho: float | Method = 0.05, gamma: float = 0.5) -> Method:
    """Sharpness-sensitive data selection alone: SAM that descends on the examples that ε hurts most.

    B' = the max(1, ⌊γB⌋) examples of largest ℓᵢ(w + ε) − ℓᵢ(w);  d = g₁ on B', with SAM's ε.

    Args:
        rho: radius of SAM's ball, or a method whose ε is taken. Default 0.05.
        gamma: γ, share of the batch that pass two sees, in (0, 1]. Default 0.5.

    Raises:
        ValueError: if gamma lies outside (0, 1], or the method given selects examples itself.

    Cost:
        4/3 + γ propagations; 1.83 at the defaults.

    Source:
        Du et al. 2022 (ESAM), section 2.3.
    """
    return _selected(ascent(rho), gamma)


def _masked(method: Method, beta: float) -> Method:
    checks.share(beta=beta)
    if beta == 1:
        return method
    if method.perturb.share < 1 or method.perturb.memories:
        raise ValueError(f"beta={beta!r} picks tensors, but {method!r} has a mask of its own: {method.perturb!r}")
    return replace(method, perturb=Masked(method.perturb, beta))


def _selected(method: Method, gamma: float) -> Method:
    checks.share(gamma=gamma)
    if gamma == 1:
        return method
    if method.select is not None:
        raise ValueError(f"gamma={gamma!r} selects examples, but {method!r} does so itself: {method.select!r}")
    return replace(method, select=Sharpest(gamma))
