"""Random weight perturbation."""

from __future__ import annotations

from .. import checks
from ..method import Method, recipe
from ..parts import Always, Another, FilterNoise, Mix


@recipe
def rwp(gamma: float = 0.01, alpha: float = 0.5, other: bool = False) -> Method:
    """Random weight perturbation: mix the plain gradient with the one at randomly perturbed weights.

    ε_k ~ N(0, (γ‖w_k‖)² I) on each filter k;  d = α g₀(B) + (1 − α) g₁(B').

    A filter is a slice along dimension 0 of a tensor of two dimensions and more, or a whole tensor of one dimension.
    The deviation is γ‖w_k‖, not divided by the root of the filter's size. The authors' code puts its ``alpha`` on the
    perturbed side; this is the paper's eq. 4. The two passes do not depend on each other. At α = 0 pass one is not run:
    the loss returned, and the running statistics, are then those of the perturbed pass.

    Args:
        gamma: γ, deviation of the noise in units of the filter's norm. Default 0.01 (CIFAR); 0.005 on ImageNet, 0.001
            for ViT and fine-tuning.
        alpha: α, share of the plain gradient, in [0, 1]. Default 0.5.
        other: take another batch for pass two, given as ``opt.step(batch, second)``. Default False: the same.

    Raises:
        ValueError: if gamma < 0, alpha lies outside [0, 1], or another batch is to be taken at alpha = 0.

    Cost:
        2 propagations; 1 at α = 0.

    Source:
        Li et al. 2022 (RWP), eq. 4 and algorithm 1.
    """
    checks.non_negative(gamma=gamma)
    checks.flag(other=other)
    if other and alpha == 0:
        raise ValueError("other=True takes a second batch beside the first, but alpha=0 runs no pass on the first")
    return Method(Always(gamma), FilterNoise(), Mix(alpha), Another() if other else None)
