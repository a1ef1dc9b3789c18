"""GELU: its second derivative in closed form."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from .third import refuse_third


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """Return what ``torch.nn.functional.gelu`` does; NotImplemented for the approximation by tanh."""
    if approximate != "none":
        return NotImplemented  # type: ignore[no-any-return]
    result: Tensor = _Gelu.apply(input)  # type: ignore[no-untyped-call]
    return result


class _Gelu(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.nn.functional.gelu(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        slope: Tensor = _Slope.apply(g, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return slope


class _Slope(Function):
    """``g·φ'(x)``, with ``φ'' = (2 − x²)·exp(−x²/2)/√(2π)``."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(g, x)
        return torch.ops.aten.gelu_backward(g, x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, a: Tensor) -> tuple[Tensor | None, Tensor | None]:
        g, x = ctx.saved_tensors
        by_g = torch.ops.aten.gelu_backward(a, x) if ctx.needs_input_grad[0] else None
        by_x = None
        if ctx.needs_input_grad[1]:
            refuse_third()
            square = x * x
            by_x = square.mul(-0.5).exp_().mul_(square.neg_().add_(2)).mul_(a).mul_(g).mul_(1 / math.sqrt(2 * math.pi))
        return by_g, by_x
