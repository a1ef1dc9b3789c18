"""What torch keeps of the weights, and would go on with after they have moved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.utils import parametrize


@contextmanager
def forgotten() -> Iterator[None]:
    """Start without the casts of an outer ``autocast`` and the values of ``parametrize.cached()``, and leave none."""
    _clear()
    try:
        yield
    finally:
        _clear()


def _clear() -> None:
    torch.clear_autocast_cache()
    parametrize._cache.clear()
