"""Linear layers and convolutions as one thing: a matrix that meets an input at each of many shared positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..vec import Vec
from .blocks import Seen

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
Linear: TypeAlias = nn.Linear | Convolution
ENTRIES = 2**22
"""How many numbers the inputs of all positions are that are laid out at a time."""


def pieces(layer: Linear, seen: Seen, columns: tuple[bool, bool], dtype: torch.dtype) -> Iterator[tuple[Tensor, Vec]]:
    """Give, for a few examples at a time, the inputs and for each score the gradients of the outputs.

    Inputs have the shape (groups, in, examples, positions), gradients (groups, out, examples, positions). Further calls
    of the layer are further positions; one that the outputs do not depend on is left out. Where dimension 0 is not one
    of examples, as in a layer that works on positions all of them share, the whole is taken for one example: with
    labels drawn from the model, the expected square of a sum over examples is the sum of their squares.

    Args:
        layer: the layer.
        seen: what passes showed of it.
        columns: whether the inputs that the weight meets are wanted, and whether the 1 that the bias meets, the last.
        dtype: of what is given.
    """
    calls = list(zip(seen.inputs, *seen.gradients, strict=True))
    calls = [tuple(_batched(layer, t) for t in call) for call in calls if call[-1] is not None]
    if not calls:
        return
    fan_out, fan_in = len(layer.weight), layer.weight[0].numel() * groups(layer)
    count = example_count([x for x, *_ in calls], seen.size)
    step = max(1, count * ENTRIES // max(1, sum(call[-1].numel() // fan_out * fan_in for call in calls)))
    for first in range(0, count, step):
        last = min(first + step, count)
        a, *scores = zip(*[[t[len(t) * first // count : len(t) * last // count].to(dtype) for t in call]
                           for call in calls], strict=True)  # fmt: skip
        yield (
            _join([_inputs(layer, x, columns) for x in a], last - first),
            [_join([_outputs(layer, g) for g in each], last - first) for each in scores],
        )


def example_count(tensors: Sequence[Tensor], size: int) -> int:
    """Return the number of examples that the rows of the tensors belong to, in turn: ``size``, or 1 where unknown."""
    return size if all(len(t) % size == 0 for t in tensors) else 1


def groups(layer: Linear) -> int:
    """Return how many matrices side by side the layer is."""
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def _batched(layer: Linear, t: Tensor) -> Tensor:
    """Return an input, or the gradient of an output, with the dimension of examples, which layers do not insist on."""
    alone = t.ndim == (1 if isinstance(layer, nn.Linear) else len(layer.kernel_size) + 1)
    return t.unsqueeze(0) if alone else t


def _inputs(layer: Linear, x: Tensor, columns: tuple[bool, bool]) -> Tensor:
    """Return what the weight and the bias meet, (groups, in, rows, positions)."""
    weight, bias = columns
    if isinstance(layer, nn.Linear):
        x = F.pad(x if weight else x[..., :0], (0, int(bias)), value=1.0)
        return x.reshape(len(x), -1, x.shape[-1]).permute(2, 0, 1).unsqueeze(0)
    spread = _patches(layer, x)
    spread = spread if weight else spread[:, :0]
    return F.pad(spread, (0, 0, 0, 0, 0, 1), value=1.0) if bias else spread


def _outputs(layer: Linear, g: Tensor) -> Tensor:
    """Return gradients of outputs as (groups, out, rows, positions)."""
    if isinstance(layer, nn.Linear):
        return g.reshape(len(g), -1, g.shape[-1]).permute(2, 0, 1).unsqueeze(0)
    return g.reshape(len(g), layer.groups, len(layer.weight) // layer.groups, -1).permute(1, 2, 0, 3)


def _patches(layer: Convolution, x: Tensor) -> Tensor:
    """Return what is under the kernel at each place, (groups, channels/groups · kernel, rows, places)."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    for i, (size, stride, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        x = x.unfold(2 + i, (size - 1) * dilation + 1, stride)[..., ::dilation]
    n = len(layer.kernel_size)
    x = x.reshape(len(x), layer.groups, -1, *x.shape[2:])  # rows, groups, channels, places..., kernel...
    x = x.permute(1, 2, *range(3 + n, 3 + 2 * n), 0, *range(3, 3 + n))
    return x.flatten(3 + n).flatten(1, 1 + n)


def _join(calls: Vec, count: int) -> Tensor:
    """Return the positions of all calls side by side, their rows sorted by ``count`` examples."""
    parts = [t.reshape(*t.shape[:2], count, -1) for t in calls]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)
