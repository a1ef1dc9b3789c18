"""Perturbations of bf16 and fp16 weights that do not round away."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Generator, Tensor

from . import vec
from .vec import Vec

Rounding = Literal["stochastic", "nearest", "float32"]


def is_low(tensors: Iterable[Tensor]) -> bool:
    """Whether any of the tensors is of a floating-point type of fewer than 32 bits."""
    return any(t.is_floating_point() and t.element_size() < 4 for t in tensors)


@torch.no_grad()
def add_(u: Vec, v: Vec, c: Tensor | float, generator: Callable[[torch.device], Generator] | None) -> Tensor:
    """Overwrite ``u`` by ``u + c·v``, made in float32, and measure what became of it.

    Stochastic rounding takes one of the two neighbours of x at random, such that its expectation is x:
    ``u + c·v`` keeps its projection on ``c·v``, where rounding to the nearest drops what is below half a unit in the
    last place.

    Args:
        u: weights of any floating-point type.
        v: direction, aligned with ``u``.
        c: factor.
        generator: makes the generator of a device's random numbers; None to round to the nearest.

    Returns:
        ``(‖Δ‖², Δᵀcv, ‖cv‖²)`` with Δ the change that really happened, float32 of shape (3,).
    """
    sums = []
    draws: dict[torch.device, Generator] = {}
    for a, b in zip(vec.local(u), vec.local(v), strict=True):
        asked = b.float() * (c.to(b.device) if isinstance(c, Tensor) else c)
        before = a.clone()
        if not is_low([a]):
            a.add_(asked)
        elif generator is None:
            a.copy_(a.float() + asked)
        else:
            if a.device not in draws:
                draws[a.device] = generator(a.device)
            a.copy_(_stochastic(a.float() + asked, a.dtype, draws[a.device]))
        change = a.float() - before.float()
        sums.append(torch.stack([(change * change).sum(), (change * asked).sum(), (asked * asked).sum()]))
    return vec.total(sums, u)


def _stochastic(x: Tensor, dtype: torch.dtype, generator: Generator) -> Tensor:
    """Return one of the two neighbours of ``x`` in ``dtype``, at random, with expectation ``x``."""
    near = x.to(dtype)
    rest = x - near.float()
    away = rest.sign() * near.float().sign().where(near != 0, rest.sign())
    beside = (near.view(torch.int16) + away.to(torch.int16)).view(dtype)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # a subnormal has no sign to step over
    beside = beside.where(near != 0, (rest.sign() * smallest).to(dtype))
    share = (rest / (beside.float() - near.float())).nan_to_num_(0.0, 0.0, 0.0)
    draw = torch.rand(x.shape, device=x.device, generator=generator)
    return beside.where(draw < share, near)


@contextmanager
def widened(weights: Iterable[Tensor], buffers: Iterable[Tensor]) -> Iterator[None]:
    """Hold the bf16 and fp16 tensors in float32 for a while.

    Then the weights are what they were, to the bit, and the buffers what became of them, rounded.
    """
    home = [(t, t.data) for t in weights if is_low([t])]
    moving = [(t, t.data) for t in buffers if is_low([t])]
    try:
        for t, narrow in [*home, *moving]:
            t.data = narrow.float()
        yield
    finally:
        for t, narrow in home:
            t.data = narrow
        for t, narrow in moving:
            t.data = narrow.copy_(t.data)
