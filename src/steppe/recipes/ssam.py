"""Sparse SAM: ε on a part of the single weights."""

from __future__ import annotations

from dataclasses import replace

from ..method import Method, recipe
from ..parts import DynamicSparse, FisherSparse
from .sam import ascent


@recipe
def ssam(rho: float | Method = 0.05, s: float = 0.5, n: int = 128, refresh: int = 100) -> Method:
    """Sparse SAM by Fisher information: perturb only the weights that matter most.

    ε = SAM's ε ⊙ mask;  mask = global top 1 − s of Σᵢ (∇ℓᵢ)² over n examples;  d = g₁.

    The paper refreshes by epochs, which an optimizer does not see; here ``refresh`` counts steps. The examples are
    those of the step's own batch, each run alone with the running statistics of the normalisation layers. The mask is
    full until the first refresh. It saves no time on dense hardware.

    Args:
        rho: radius of SAM's ball, or a method whose ε is taken. Default 0.05.
        s: share of the weights left alone, in [0, 1). Default 0.5.
        n: examples for the Fisher information, at most the batch. Default 128.
        refresh: steps between two masks; one that is due on a step that is not sharp is left out. Default 100.

    Raises:
        ValueError: if s lies outside [0, 1), n or refresh < 1, or the method given has a mask of its own or a
            second-order term.

    Cost:
        2 propagations, and min(n, B)/B more on every ``refresh``-th step.

    Source:
        Mi et al. 2022, "Make sharpness-aware minimization stronger: a sparsified perturbation approach" (SSAM-F).
    """
    method = ascent(rho)
    return replace(method, perturb=FisherSparse(method.perturb, s, n, refresh))


@recipe
def ssam_dynamic(rho: float | Method = 0.05, s: float = 0.5, drop: float = 0.5, refresh: int = 100) -> Method:
    """Sparse SAM by dynamic sparse training: the mask drops its flattest weights and regrows others at random.

    ε = SAM's ε ⊙ mask of density 1 − s;  every ``refresh`` steps the share d_t = drop·(1 + cos(πt/T))/2 of the kept
    weights, those of smallest |g₀|, is dropped and as many of the others regrown at random;  d = g₁.

    Args:
        rho: radius of SAM's ball, or a method whose ε is taken. Default 0.05.
        s: share of the weights left alone, in [0, 1). Default 0.5.
        drop: d₀, share dropped at the start, in [0, 1]. Default 0.5.
        refresh: steps between two changes of the mask; one that is due on a step that is not sharp is left out.
            Default 100.

    Raises:
        ValueError: if s lies outside [0, 1), drop outside [0, 1], refresh < 1, or the method given has a mask of its
            own or a second-order term.

    Cost:
        2 propagations.

    Source:
        Mi et al. 2022, "Make sharpness-aware minimization stronger: a sparsified perturbation approach" (SSAM-D).
    """
    method = ascent(rho)
    return replace(method, perturb=DynamicSparse(method.perturb, s, drop, refresh))
