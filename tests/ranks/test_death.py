"""A rank that dies ends the job in bounded time, and the job goes on from its checkpoint as if nothing had been."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from recipes_list import same

EPOCHS, STEPS = 3, 16  # steps an epoch of the example
EXAMPLE = Path(__file__).parents[2] / "examples" / "ddp.py"
DYING = Path(__file__).with_name("dying.py")


def torchrun(checkpoint: Path, *program: Any) -> subprocess.CompletedProcess[str]:
    """Run a program on two ranks, two minutes at the most: a hang is an error."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *program]
    command += ["--epochs", EPOCHS, "--checkpoint", checkpoint]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([str(each) for each in command], env=environment, capture_output=True, text=True, timeout=120)


def test_the_job_ends_and_goes_on_from_its_checkpoint(tmp_path):
    """A death in the middle of a step, then one in the middle of writing a checkpoint."""
    whole, checkpoint = tmp_path / "whole.pt", tmp_path / "run.pt"
    done = torchrun(whole, EXAMPLE)
    assert done.returncode == 0, done.stderr

    for deaths, (where, count) in enumerate([("step", STEPS + 5), ("save", 2)], 1):
        died = torchrun(checkpoint, DYING, where, count)
        assert died.returncode != 0
        assert re.search(r"exitcode\s*: 7", died.stderr), died.stderr
        assert torch.load(checkpoint, weights_only=True)["epochs"] == deaths, "the one before the death is whole"

    resumed = torchrun(checkpoint, EXAMPLE)
    assert resumed.returncode == 0, resumed.stderr
    assert "epoch 2:" not in resumed.stdout, "it has started afresh"
    end, uninterrupted = (torch.load(path, weights_only=True) for path in (checkpoint, whole))
    assert same(end["model"], uninterrupted["model"])
    assert same(end["optimizer"]["state"], uninterrupted["optimizer"]["state"])
    assert end["epochs"] == EPOCHS
