"""Spatial averaging of a Hessian diagonal: neighbours share one value."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

Block: TypeAlias = int | Literal["row"]


def averaged(diagonal: Tensor, block: Block) -> Tensor:
    """Return the mean over its block at every entry, shaped as ``diagonal``; itself where blocks have one entry.

    A number, or a vector, is left as it is. The blocks of a matrix (rows, columns) are ``block`` consecutive entries
    of a row, the last of a row maybe fewer. A tensor of three dimensions or more, (out, in, ...), is averaged over all
    but the first two: the kernel of a convolution.

    Args:
        diagonal: one entry for each weight, shaped as the weights.
        block: entries in a block of a matrix, at least 1; or ``"row"`` for whole rows, as for the vectors of an
            embedding.

    Source:
        Yao et al. 2021, "AdaHessian", eq. 10 and figure 5.
    """
    if diagonal.ndim < 2 or not diagonal.numel():
        return diagonal
    if diagonal.ndim > 2:
        return diagonal.mean(tuple(range(2, diagonal.ndim)), keepdim=True).expand_as(diagonal)
    columns = diagonal.shape[1]
    size = columns if block == "row" else min(block, columns)
    if size == 1:
        return diagonal
    whole = columns - columns % size
    blocks = _spread(diagonal[:, :whole].reshape(len(diagonal), -1, size)).flatten(1)
    return torch.cat([blocks, _spread(diagonal[:, whole:])], 1) if whole < columns else blocks


def _spread(blocks: Tensor) -> Tensor:
    """Return the mean over the last dimension, at every entry of it."""
    return blocks.mean(-1, keepdim=True).expand_as(blocks)
