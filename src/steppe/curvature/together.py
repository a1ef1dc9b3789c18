"""Ranks that measure together: where one cannot go on, the others do not wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


class ElsewhereError(ValueError):
    """Another rank has failed."""


def agree(group: dist.ProcessGroup | None, device: torch.device, *, failed: bool = False) -> None:
    """Tell the other ranks whether this one has failed. It comes before each of their exchanges.

    Raises:
        ElsewhereError: if another rank has.
    """
    if group is None:
        return
    flag = torch.tensor(float(failed), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
    if flag > 0 and not failed:
        raise ElsewhereError("the measurement fails on another rank: its own error says why")


@contextmanager
def together(group: dist.ProcessGroup | None, device: torch.device) -> Iterator[None]:
    """Go through a part of a measurement; at its end all ranks raise if one has. It may be nested."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, ElsewhereError) and not hasattr(error, "told"):
            error.told = True  # type: ignore[attr-defined]
            agree(group, device, failed=True)
        raise
    agree(group, device)
