"""Batch norm: its double backward by the kernels of the first.

``y = γ x̂ + β`` with ``x̂ = r (x − mean)``, r one over the standard deviation, both over the D entries of a
channel. The Jacobian ``J = ∂x̂/∂x = r (1 − 11ᵀ/D − x̂x̂ᵀ/D)`` is symmetric, so a gradient g gives ``∂x = J(γg)``,
``∂γ = Σ g x̂``, ``∂β = Σ g``. Cotangents a, u, v of these three then give

    by g:  γ Ja + u x̂ + v
    by γ:  Σ g Ja
    by x:  J(ug) − (r/D) [ (a·J(γg)) x̂ + (γg·x̂) Ja + (a·x̂) J(γg) ]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Return what ``torch.nn.functional.batch_norm`` does; NotImplemented where that does it itself."""
    if input.dtype not in (torch.float32, torch.float64) or input.numel() <= input.shape[1]:
        return NotImplemented  # type: ignore[no-any-return]
    if not training:
        if running_mean is None or running_var is None:
            return NotImplemented  # type: ignore[no-any-return]
        scale = (running_var + eps).rsqrt()
        scale = scale if weight is None else scale * weight
        shift = -running_mean * scale
        shift = shift if bias is None else shift + bias
        return torch.addcmul(_along(shift, input), input, _along(scale, input))
    result: Tensor = _BatchNorm.apply(input, weight, bias, running_mean, running_var, momentum, eps)  # type: ignore[no-untyped-call]
    return result


def _along(channels: Tensor, x: Tensor) -> Tensor:
    """Return a number for each channel beside the entries of x."""
    return channels.reshape(1, -1, *[1] * (x.ndim - 2))


def _over(x: Tensor) -> list[int]:
    """Return all dimensions but the channels'."""
    return [0, *range(2, x.ndim)]


class _BatchNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        y, center, r = torch.native_batch_norm(x, weight, bias, mean, var, True, momentum, eps)
        ctx.save_for_backward(x, weight, center, r)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        slopes = _BatchSlopes.apply(g, *ctx.saved_tensors, ctx.eps)  # type: ignore[no-untyped-call]
        wanted = zip(slopes, ctx.needs_input_grad[:3], strict=True)
        return (*(slope if need else None for slope, need in wanted), None, None, None, None)


def _jacobian(v: Tensor, x: Tensor, center: Tensor, r: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``Jv``, ``Σ v x̂`` and ``Σ v`` of each channel."""
    one = torch.ones_like(center)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
        v, x, one, None, None, center, r, True, eps, [True, True, True]
    )
    return found


class _BatchSlopes(Function):
    """The first backward."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor | None, center: Tensor, r: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        slope, along, total = _jacobian(g, x, center, r, eps)
        ctx.save_for_backward(g, x, weight, center, r, slope, along)
        ctx.eps = eps
        return slope * _along(weight, x) if weight is not None else slope.clone(), along.clone(), total

    @staticmethod
    def backward(ctx: Any, a: Tensor | None, u: Tensor | None, v: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("batch norm has no third derivative here: no create_graph=True in the second backward")
        g, x, weight, center, r, slope, along = ctx.saved_tensors
        scale = torch.ones_like(center) if weight is None else weight
        zero = torch.zeros_like(center)
        u_, v_ = zero if u is None else u, zero if v is None else v
        by_g = by_x = by_weight = None
        if a is None:
            if ctx.needs_input_grad[0] and (u is not None or v is not None):
                by_g = (x * _along(u_ * r, x) + _along(v_ - u_ * r * center, x)).expand_as(g)
            if ctx.needs_input_grad[1] and u is not None:
                by_x = slope * _along(u, x)
            return by_g, by_x, None, None, None, None
        pulled, across, _ = _jacobian(a, x, center, r, ctx.eps)
        shared = (g * pulled).sum(_over(x))
        if ctx.needs_input_grad[2]:
            by_weight = shared
        if ctx.needs_input_grad[0]:
            by_g = torch.addcmul(_along(v_ - u_ * r * center, x), pulled, _along(scale, x))
            by_g = by_g if u is None else by_g.addcmul_(x, _along(u * r, x))
        if ctx.needs_input_grad[1]:
            count = x.numel() // x.shape[1]
            part = -r * scale / count
            tilt = part * shared * r
            by_x = torch.addcmul(_along(-tilt * center, x), x, _along(tilt, x))
            by_x.addcmul_(pulled, _along(part * along, x)).addcmul_(slope, _along(part * across + u_, x))
        return by_g, by_x, by_weight, None, None, None
