"""Runs a function on several gloo ranks of this machine, one thread each, within a bounded time."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

FORKS = mp.get_context("forkserver")  # ranks start in a tenth of a second: the server has torch imported
FORKS.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "pytest", "steppe"])


def launch(world: int, function: Callable[..., Any], *args: Any, seconds: float = 60.0) -> list[Any]:
    """Return what ``function(*args)`` returned on each of ``world`` ranks, in their order.

    Raises:
        torch.multiprocessing.ProcessRaisedException: with the traceback of the rank that raised.
        torch.multiprocessing.ProcessExitedException: if a rank died.
        TimeoutError: if the ranks are not done after ``seconds``; they are killed.
    """
    _warm_up()
    with tempfile.TemporaryDirectory() as name:
        folder, end = Path(name), time.monotonic() + seconds
        jobs = mp.start_processes(
            _rank, (world, folder, seconds, function, args), world, join=False, start_method="forkserver"
        )
        try:
            while not jobs.join(timeout=1.0):
                if time.monotonic() > end:
                    raise TimeoutError(f"{function.__name__} on {world} ranks is not done after {seconds:g} s")
        finally:
            for process in jobs.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


@functools.cache
def _warm_up() -> None:
    """Wait until the server has imported what it preloads: no rank's time."""
    first = FORKS.Process(target=int)
    first.start()
    first.join()


def _rank(rank: int, world: int, folder: Path, seconds: float, function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1000 + rank)  # whatever is drawn from the global generator differs from rank to rank
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=seconds))
    try:
        torch.save(function(*args), folder / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
