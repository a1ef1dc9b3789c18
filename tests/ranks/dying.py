"""examples/ddp.py with a death: ``python dying.py step|save COUNT ARGS...`` under torchrun.

``step``: rank 1 dies in the last pass of its COUNT-th step. ``save``: rank 0 dies half-way through its COUNT-th
checkpoint.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import ddp

PLAIN, SAVE = ddp.losses, torch.save
_, where, when, *sys.argv[1:] = sys.argv
calls = 0


def losses(model: nn.Module, batch: Any) -> Tensor:
    """ESAM's three passes a step; the death comes at perturbed weights."""
    global calls
    calls += 1
    found = PLAIN(model, batch)
    if where == "step" and dist.get_rank() == 1 and calls == 3 * int(when):
        os._exit(7)
    return found


def save(state: Any, path: Path) -> None:
    """Write half of the file and die, or all of it."""
    global calls
    calls += 1
    if where == "step" or calls < int(when):
        SAVE(state, path)
        return
    whole = io.BytesIO()
    SAVE(state, whole)
    path.write_bytes(whole.getvalue()[: whole.tell() // 2])
    os._exit(7)


if where == "step":
    ddp.losses = losses
else:
    torch.save = save
ddp.main()
