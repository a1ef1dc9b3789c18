"""Means over seeds, with their uncertainty."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = ["Difference", "Estimate", "difference", "estimate"]


NO_SPREAD = 1e-12
"""Standard error, over the largest value, that is mere rounding."""


class Estimate(NamedTuple):
    """A mean with its 95 % confidence interval."""

    mean: float
    half: float | None
    """Half the width of the interval; None with fewer than two values."""
    n: int


class Difference(NamedTuple):
    """A mean paired difference with its 95 % confidence interval and p-value."""

    mean: float
    half: float | None
    """Half the width of the interval; None with fewer than two pairs."""
    p: float | None
    """Two-sided p-value of the paired t-test against 0; None where there is no spread to hold the mean against."""
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of a sample and Student's 95 % interval.

        mean ± t(0.975, n-1) · s / √n

    Raises:
        ValueError: if there are no values.
    """
    if not values:
        raise ValueError("no values to estimate from")
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Estimate(mean, None, n)
    from scipy.special import stdtrit

    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return Estimate(mean, float(stdtrit(n - 1, 0.975)) * deviation / math.sqrt(n), n)


def difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Mean of `values - baseline` over the seeds that both have; None if there are none.

    Args:
        values: seed to value.
        baseline: seed to the value that is subtracted.
    """
    pairs = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    if not pairs:
        return None
    mean, half, n = estimate(pairs)
    if half is None:
        return Difference(mean, None, None, n)
    from scipy.special import stdtr, stdtrit

    error = half / float(stdtrit(n - 1, 0.975))
    if error <= NO_SPREAD * max(abs(value) for value in (*values.values(), *baseline.values())):
        return Difference(mean, half, 1.0 if mean == 0 else None, n)
    return Difference(mean, half, 2 * float(stdtr(n - 1, -abs(mean) / error)), n)
