"""The examples of a batch, whatever holds them: a tensor, or a nest of tensors with the batch along dimension 0."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def extent(data: Any) -> tuple[int, torch.device]:
    """Return the number of examples, and their device, from the first tensor that has a dimension."""
    for leaf in leaves(data):
        if leaf.ndim:
            return len(leaf), leaf.device
    raise TypeError(f"data of type {type(data).__name__} holds no tensor with a batch dimension")


def take(data: Any, rows: Tensor | slice, size: int) -> Any:
    """Return the rows of every tensor, array and plain list that has ``size`` of them; everything else as it is."""

    def cut(leaf: Tensor) -> Tensor:
        return leaf[rows] if leaf.ndim and len(leaf) == size else leaf

    def cut_other(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray) and leaf.ndim and len(leaf) == size:
            return leaf[rows if isinstance(rows, slice) else rows.cpu().numpy()]
        if type(leaf) in (list, tuple) and len(leaf) == size and next(leaves(leaf), None) is None:
            return leaf[rows] if isinstance(rows, slice) else type(leaf)(leaf[i] for i in rows.tolist())
        return leaf

    return _map(data, cut, cut_other)


def to_float32(data: Any) -> Any:
    """Return the data with every tensor of fewer than 32 floating-point bits in float32."""
    return _map(data, lambda leaf: leaf.float() if leaf.is_floating_point() and leaf.element_size() < 4 else leaf)


def to_device(data: Any, device: torch.device) -> Any:
    """Return the data with every tensor on ``device``."""
    return data.to(device) if hasattr(data, "to") else _map(data, lambda leaf: leaf.to(device))


def leaves(data: Any) -> Iterator[Tensor]:
    """Give the tensors one after the other."""
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, Mapping):
        for value in data.values():
            yield from leaves(value)
    elif isinstance(data, Sequence) and not isinstance(data, str):
        for value in data:
            yield from leaves(value)


def _map(data: Any, change: Any, change_other: Any = lambda leaf: leaf) -> Any:
    if isinstance(data, Tensor):
        return change(data)
    if isinstance(data, Mapping):
        changed = {key: _map(value, change, change_other) for key, value in data.items()}
        if type(data) is dict or not isinstance(data, MutableMapping):
            return changed
        same_type = copy.copy(data)
        same_type.update(changed)
        return same_type
    if isinstance(data, Sequence) and not isinstance(data, str):
        changed = change_other(data)
        if changed is not data:
            return changed
        parts = [_map(value, change, change_other) for value in data]
        if all(new is old for new, old in zip(parts, data, strict=True)):
            return data
        return type(data)(*parts) if hasattr(data, "_fields") else type(data)(parts)  # type: ignore[call-arg]
    return change_other(data)
