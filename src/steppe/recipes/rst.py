"""Randomized sharpness-aware training: a coin decides whether a step is sharp, and schedules decide the coin."""

from __future__ import annotations

from dataclasses import replace

from ..method import Method, recipe
from ..parts import Amplified, Coin, Cosine, Linear, Piecewise, Sine
from ..parts.when import Probability


@recipe
def rst(method: Method, p: Probability = 0.5) -> Method:
    """Randomized sharpness-aware training: a coin decides whether a step is sharp.

    X_t ~ Bernoulli(p(t));  X = 1: d of the method;  X = 0: d = g₀.

    Around ``looksam(k)`` the period k counts all steps of the training, heads and tails.

    Args:
        method: the method of the sharp steps.
        p: probability of a sharp step, in [0, 1], or a schedule: ``piecewise``, ``linear``, ``cosine``, ``sine``.
            Default 0.5.

    Raises:
        ValueError: if p lies outside [0, 1], or the method flips a coin already.
        TypeError: if the first argument is no method, or p neither a number nor a schedule.

    Cost:
        1 + p̄·(cost of the method − 1) propagations, p̄ the mean of p(t); 1.5 around SAM at p = ½.

    Source:
        RST 2022, algorithm 1, eq. 4.
    """
    return replace(method, when=_coin(method, p))


@recipe
def grst(method: Method, p: Probability = 0.5, strength: float = 2.0) -> Method:
    """General RST: sharp steps are rarer, and each of them stronger.

    X = 1: d = g₀ + s (d_method − g₀);  X = 0: d = g₀.  In expectation the regularization is p·s times the method's; p
    = ½ and s = 2 equal SAM's.

    Args:
        method: the method of the sharp steps.
        p: probability of a sharp step, in [0, 1], or a schedule. Default 0.5.
        strength: s = γ_gnr/ρ. Default 2.

    Raises:
        ValueError: if p lies outside [0, 1], strength is not finite, the method flips a coin already, or it leaves
            weight gradients of pass one out.
        TypeError: if the first argument is no method, or p neither a number nor a schedule.

    Cost:
        1 + p̄·(cost of the method − 1) propagations; 1.5 around SAM at p = ½.

    Source:
        RST 2022, section 4, eq. 6 and 7.
    """
    return replace(method, when=_coin(method, p), combine=Amplified(method.combine, strength))


@recipe
def piecewise(a: float, b: float) -> Piecewise:
    """A probability that changes once: a, then 1 − a.

    p(t) = a for t < bT, then 1 − a.  Mean: ba + (1 − b)(1 − a).

    Args:
        a: probability of the first stage, in [0, 1].
        b: share of the training that the first stage takes, in [0, 1].

    Raises:
        ValueError: if a or b lies outside [0, 1].

    Source:
        RST 2022, table 2.
    """
    return Piecewise(a, b)


@recipe
def linear(start: float, end: float) -> Linear:
    """A probability that changes in a straight line.

    p(t) = start + (end − start)·t/T.  Mean: p(T/2).

    The paper's groups: through (T/2, m) and (0, 0) for m ≤ ½ is ``linear(0, 2m)``; through (T/2, m) and (T, 1) for m
    > ½ is ``linear(2m − 1, 1)``; through (0, b) and (T/2, ½) is ``linear(b, 1 − b)``.

    Args:
        start: probability at the first step, in [0, 1].
        end: probability at the end, in [0, 1].

    Raises:
        ValueError: if start or end lies outside [0, 1].

    Source:
        RST 2022, table 2.
    """
    return Linear(start, end)


@recipe
def cosine(flipped: bool = False) -> Cosine:
    """A probability that falls along half a cosine, or rises.

    p(t) = ½ + ½cos(πt/T), or 1 minus that.  Mean: ½.

    Args:
        flipped: take 1 minus that, which rises from 0 to 1. Default False.

    Raises:
        ValueError: if flipped is neither True nor False.

    Source:
        RST 2022, appendix B.1, figure 4 and table 5.
    """
    return Cosine(flipped)


@recipe
def sine(flipped: bool = False) -> Sine:
    """A probability that is largest in the middle, or smallest.

    p(t) = sin(πt/T), or 1 minus that.  Mean: 2/π, or 1 − 2/π.

    Args:
        flipped: take 1 minus that. Default False.

    Raises:
        ValueError: if flipped is neither True nor False.

    Source:
        RST 2022, appendix B.1, figure 4 and table 5.
    """
    return Sine(flipped)


def _coin(method: Method, p: Probability) -> Coin:
    if not isinstance(method, Method):
        raise TypeError(f"the method of the sharp steps is {method!r}: give a recipe, as in rst(sam(), p=0.5)")
    if isinstance(method.when, Coin):
        raise ValueError(f"{method!r} flips a coin already: multiply the two probabilities instead")
    return Coin(method.when, p)
