"""Convolutions: their double backward is four convolutions like those of the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

Options = tuple[list[int], list[int], list[int], int]
"""Stride, padding, dilation, groups."""


def convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Return what ``torch.conv1d``, ``conv2d`` or ``conv3d`` does; NotImplemented where they do it themselves."""
    if isinstance(padding, str) or input.ndim != weight.ndim:
        return NotImplemented  # type: ignore[no-any-return]
    sizes = [_each(value, weight.ndim - 2) for value in (stride, padding, dilation)]
    result: Tensor = _Convolution.apply(input, weight, bias, (*sizes, groups))  # type: ignore[no-untyped-call]
    return result


def _each(value: int | Sequence[int], dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def _forward(x: Tensor, w: Tensor, bias: Tensor | None, options: Options) -> Tensor:
    stride, padding, dilation, groups = options
    return torch.convolution(x, w, bias, stride, padding, dilation, False, [0] * len(stride), groups)


def _backward(g: Tensor, x: Tensor, w: Tensor, options: Options, mask: list[bool]) -> tuple[Tensor | None, ...]:
    stride, padding, dilation, groups = options
    found: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
        g, x, w, [w.shape[0]], stride, padding, dilation, False, [0] * len(stride), groups, mask
    )
    return found


class _Convolution(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, options: Options) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.options = options
        return _forward(x, w, bias, options)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        slopes = _Slopes.apply(g, *ctx.saved_tensors, ctx.options, list(ctx.needs_input_grad[:3]))  # type: ignore[no-untyped-call]
        return (*slopes, None)


class _Slopes(Function):
    """The first backward: gradients by input, weight and bias, linear in each of g, x and w."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, w: Tensor, options: Options, mask: list[bool]
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, w)
        ctx.options = options
        return tuple(_backward(g, x, w, options, mask))

    @staticmethod
    def backward(ctx: Any, a: Tensor | None, b: Tensor | None, c: Tensor | None) -> tuple[Tensor | None, ...]:
        (g, x, w), options = ctx.saved_tensors, ctx.options
        by_g = by_x = by_w = None
        if ctx.needs_input_grad[0]:
            parts = [_forward(a, w, c, options)] if a is not None else []
            if b is not None:
                parts.append(_forward(x, b, c if a is None else None, options))
            if parts:
                by_g = parts[0] if len(parts) == 1 else parts[0] + parts[1]
            elif c is not None:
                by_g = c.reshape(1, -1, *[1] * (g.ndim - 2)).expand_as(g)
        if ctx.needs_input_grad[1] and b is not None:
            by_x = _backward(g, x, b, options, [True, False, False])[0]
        if ctx.needs_input_grad[2] and a is not None:
            by_w = _backward(g, a, w, options, [False, True, False])[1]
        return by_g, by_x, by_w, None, None
