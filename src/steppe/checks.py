"""Checks of arguments: each returns nothing and raises ``ValueError`` with the name, the value and the mend."""

from __future__ import annotations

import math


def non_negative(**values: float) -> None:
    """Refuse a value that is negative, infinite or not a number."""
    for name, value in values.items():
        if not _is_number(value) or not 0 <= value < math.inf:
            raise ValueError(f"{name}={value!r} must be a finite number ≥ 0")


def finite(**values: float) -> None:
    """Refuse a value that is infinite or not a number."""
    for name, value in values.items():
        if not _is_number(value) or not math.isfinite(value):
            raise ValueError(f"{name}={value!r} must be a finite number")


def share(**values: float) -> None:
    """Refuse a value outside (0, 1]."""
    for name, value in values.items():
        if not _is_number(value) or not 0 < value <= 1:
            raise ValueError(f"{name}={value!r} must lie in (0, 1]")


def probability(**values: float) -> None:
    """Refuse a value outside [0, 1]."""
    for name, value in values.items():
        if not _is_number(value) or not 0 <= value <= 1:
            raise ValueError(f"{name}={value!r} must lie in [0, 1]")


def count(**values: int) -> None:
    """Refuse a value that is not a whole number of at least 1."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number ≥ 1")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
