"""Groups of runs, in this process or spread over several."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event
from pathlib import Path

import torch

from steppe.lab.config import Config
from steppe.lab.run import Run

__all__ = ["divided", "lockstep", "spread"]

POLL = 0.5
"""Seconds between two looks at the other processes' files."""


def lockstep(group: Sequence[Run]) -> Iterator[Run]:
    """Finish the runs of a group an epoch at a time in turn, and name each run that has moved."""
    while pending := [run for run in group if run.result is None]:
        least = min(len(run.records) for run in pending)
        for run in pending:
            if len(run.records) == least:
                run.advance()
                yield run


def divided(groups: Sequence[Sequence[Config]], jobs: int) -> list[Sequence[Config]]:
    """Return the groups, those of the last of several rounds cut into parts if processes would go without one.

    The parts of a group run side by side and not in lockstep, so a single round, which would leave no other to take the
    ratios of times from, is not cut.
    """
    left = len(groups) % jobs
    if left in (0, len(groups)):
        return list(groups)
    cut = [group[i :: jobs // left] for group in groups[-left:] for i in range(jobs // left)]
    return [*groups[:-left], *(part for part in cut if part)]


def spread(groups: Sequence[Sequence[Config]], out: Path, jobs: int) -> Iterator[Run]:
    """Finish groups of runs in several processes, and name each run that has moved.

    The processes compute with as many threads as this one. They share nothing but the runs' files, which is where
    their progress is read from. They stop after the epoch at hand when this process is interrupted or fails, and at
    once when it is killed.

    Args:
        groups: what to run; a group stays together in one process, but for those that `divided` cuts.
        out: folder of the study.
        jobs: number of processes.
    """
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    watched = {config: Run(config, out) for group in groups for config in group}
    groups = divided(groups, jobs)
    with ProcessPoolExecutor(
        min(jobs, len(groups)), context, initializer=_start, initargs=(stop, torch.get_num_threads())
    ) as pool:
        try:
            tasks = [pool.submit(_finish, group, out) for group in groups]
            running = True
            while running:
                running = not all(task.done() for task in tasks)
                for task in tasks:
                    if task.done():
                        _check(task)
                for config, before in watched.items():
                    if before.result is None:
                        after = watched[config] = Run(config, out)
                        if (after.result, len(after.records)) != (before.result, len(before.records)):
                            yield after
                if running:
                    time.sleep(POLL)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _check(task: Future[None]) -> None:
    """Raise what ended a process early."""
    try:
        task.result()
    except BrokenProcessPool as error:
        mend = "give the same command with fewer --jobs, and it goes on"
        raise ValueError(f"a training process was killed, maybe since memory ran out: {mend}") from error


_stop: Event


def _start(stop: Event, threads: int) -> None:
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides
    torch.set_num_threads(threads)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # at any moment: a run's files are whole


def _finish(group: Sequence[Config], out: Path) -> None:
    for _ in lockstep([Run(config, out) for config in group]):
        if _stop.is_set():
            return
