"""Checks of arguments: each returns nothing and raises ``ValueError`` with the name, the value and the mend."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable


def non_negative(**values: float) -> None:
    """Refuse a value that is negative, infinite or not a number."""
    _within("be a finite number ≥ 0", values, lambda x: x >= 0)


def positive(**values: float) -> None:
    """Refuse a value that is not above 0, infinite or not a number."""
    _within("be a finite number > 0", values, lambda x: x > 0)


def finite(**values: float) -> None:
    """Refuse a value that is infinite or not a number."""
    _within("be a finite number", values, lambda x: True)


def share(**values: float) -> None:
    """Refuse a value outside (0, 1]."""
    _within("lie in (0, 1]", values, lambda x: 0 < x <= 1)


def probability(**values: float) -> None:
    """Refuse a value outside [0, 1]."""
    _within("lie in [0, 1]", values, lambda x: 0 <= x <= 1)


def below_one(**values: float) -> None:
    """Refuse a value outside [0, 1)."""
    _within("lie in [0, 1)", values, lambda x: 0 <= x < 1)


def above_one(**values: float) -> None:
    """Refuse a value that is not > 1; infinity is allowed."""
    for name, value in values.items():
        if not _is_number(value) or not value > 1:
            raise ValueError(f"{name}={value!r} must be a number > 1, or inf")


def count(**values: int) -> None:
    """Refuse a value that is not a whole number of at least 1."""
    for name, value in values.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number ≥ 1")


def one_of(**values: tuple[str, tuple[str, ...]]) -> None:
    """Refuse a word that is not one of those allowed: ``name=(value, allowed)``."""
    for name, (value, allowed) in values.items():
        if value not in allowed:
            raise ValueError(f"{name}={value!r} must be {' or '.join(map(repr, allowed))}")


def flag(**values: bool) -> None:
    """Refuse a value that is neither True nor False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be True or False")


def _within(what: str, values: dict[str, float], holds: Callable[[float], bool]) -> None:
    for name, value in values.items():
        if not _is_number(value) or not math.isfinite(value) or not holds(value):
            raise ValueError(f"{name}={value!r} must {what}")


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True
