"""The base's step with what mixed precision and clipping put before it."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import checks

Clip = float | Callable[[list[Tensor]], Any] | None


def check_clip(clip: Clip) -> None:
    """Refuse what is neither a norm nor a function.

    Raises:
        TypeError: if it is neither a number nor callable.
        ValueError: if the norm is not above 0.
    """
    if clip is None or callable(clip):
        return
    if isinstance(clip, bool) or not isinstance(clip, numbers.Real):
        raise TypeError(f"clip={clip!r} must be a number > 0, or a function of the list of parameters")
    checks.positive(clip=float(clip))


def take(base: Optimizer, params: list[Tensor], scaler: torch.amp.GradScaler | None, clip: Clip) -> bool:
    """Unscale and clip the gradients, let the base step, and return whether it did: not where they overflowed."""
    active = scaler is not None and scaler.is_enabled()
    if active:
        assert scaler is not None
        scaler.unscale_(base)
    try:
        if callable(clip):
            clip(params)
        elif clip is not None:
            torch.nn.utils.clip_grad_norm_(params, clip)
        if not active:
            base.step()
            return True
        assert scaler is not None
        before = scaler.get_scale()
        scaler.step(base)
    except BaseException:
        if active:
            assert scaler is not None
            scaler.update()  # or it takes the next step for the second half of this one
        raise
    scaler.update()
    return scaler.get_scale() >= before > 0
