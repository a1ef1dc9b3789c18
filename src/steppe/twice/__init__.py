"""Layers whose second derivative torch takes the long way, with a shorter one.

Double backward through a convolution runs convolutions with kernels as large as the image, and through batch norm some
seventy passes over the activations. Both have formulas made of the kernels that the first backward uses. Values and
derivatives are torch's own but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from . import convolutions, norms


class Twice(TorchFunctionMode):
    """Inside, what a model computes has a graph that is cheap to differentiate twice."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the replacement of a function where there is one that applies, or the function."""
        kwargs = kwargs or {}
        replacement = REPLACED.get(func)
        if replacement is not None and torch.is_grad_enabled() and not _casts(args) and not _is_checkpointed():
            result = replacement(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)


REPLACED: dict[Any, Callable[..., Tensor]] = {
    torch.conv1d: convolutions.convolve,
    torch.conv2d: convolutions.convolve,
    torch.conv3d: convolutions.convolve,
    F.batch_norm: norms.batch_norm,
}


def _is_checkpointed() -> bool:
    """Whether activation checkpointing will run the function again, out of reach, and expects the same tensors."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _casts(args: tuple[Any, ...]) -> bool:
    """Whether autocast would change the types of a function's arguments."""
    return bool(args) and isinstance(args[0], Tensor) and torch.is_autocast_enabled(args[0].device.type)
