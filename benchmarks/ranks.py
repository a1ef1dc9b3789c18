"""What a step costs on two ranks: the passes of RWP on both at once, SAM with local ascent, over SGD's own DDP step.

    python benchmarks/ranks.py [--rounds N] [--batch N]

ResNet-18 of width 16, 128 examples a rank, one thread a rank. In every round each contender takes a step, in an order
that is shuffled and the same on both ranks; a step lasts from a common start until the slower rank is done, all-reduce,
noise and restore included. It is divided by the step of SGD under DistributedDataParallel in the same round, and the
median taken over all. All SGD is the loop of torch's tutorials, without this library.

Three rows tell what two ranks cost before any method does: SGD on one rank while the other sleeps; SGD on both with
nothing reduced, which adds what they take from each other (memory bandwidth, caches); and SGD under DDP, which adds the
all-reduce.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import steppe
from machine import described
from steppe.lab import models

WORLD = 2
UNIT, ONE, APART = "SGD, DDP", "SGD, one rank", "SGD, both ranks, nothing reduced"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "rwp, the passes on two ranks": ("rwp()", {"split": True}),
    "rwp, both passes on both": ("rwp()", {}),
    "sam, local ascent": ("sam()", {"ascent": "local"}),
    "sam, global ascent": ("sam()", {}),
    "esam, global ascent": ("esam()", {}),
}
LIMITS = {"rwp, the passes on two ranks": 1.05, "sam, local ascent": 2.05}
PAPER = {"rwp, the passes on two ranks": 1.07}
Step = Callable[[], object]


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Loss of each example."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def fresh(device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The network with the same weights for everybody, and SGD over them."""
    torch.manual_seed(0)
    model = models.build("resnet18", width=16).to(device, memory_format=torch.channels_last)
    return model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)


def plain(batch: tuple[Tensor, Tensor], *, ddp: bool) -> Step:
    """Torch's own loop."""
    model, optimizer = fresh(batch[0].device)
    network = DistributedDataParallel(model) if ddp else model

    def step() -> None:
        optimizer.zero_grad()
        losses(network, batch).mean().backward()
        optimizer.step()

    return step


def ours(batch: tuple[Tensor, Tensor], text: str, how: dict[str, Any]) -> Step:
    """A method of this library under DDP."""
    model, base = fresh(batch[0].device)
    network = DistributedDataParallel(model)
    opt = steppe.SharpnessAware(base, steppe.parse(text), **how)
    return lambda: opt.step(steppe.Batch(network, losses, batch))


def measure(rank: int, store: str, kind: str, rounds: int, size: int, answer: Any) -> None:
    """Put the seconds of each contender's steps, round by round, into ``answer``."""
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.FileStore(store, WORLD), rank=rank, world_size=WORLD)
    clock = dist.new_group(backend="gloo")
    torch.manual_seed(1 + rank)
    x = torch.randn(size, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    batch = x, torch.randint(10, (size,), device=device)
    alone = plain(batch, ddp=False)
    steps: dict[str, Step] = {ONE: alone if rank == 0 else lambda: None}
    steps |= {APART: plain(batch, ddp=False), UNIT: plain(batch, ddp=True)}
    steps |= {name: ours(batch, text, how) for name, (text, how) in METHODS.items()}
    found = {name: list[float]() for name in steps}
    order, shuffle = list(steps), random.Random(0)
    for turn in range(rounds + 1):
        shuffle.shuffle(order)
        for name in order:
            dist.barrier(clock)
            start = time.perf_counter()
            steps[name]()
            if kind == "cuda":
                torch.cuda.synchronize()
            took = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(took, dist.ReduceOp.MAX, clock)
            if turn > 0:  # caches and buckets warm up in the first
                found[name].append(float(took))
    if rank == 0:
        answer.put(found)
    dist.barrier(clock)
    steps.clear()  # networks go before their group: freed after it they may hang
    dist.destroy_process_group()


def run(kind: str, rounds: int, size: int) -> dict[str, list[float]]:
    """Seconds of each contender's steps on two ranks."""
    answer = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (str(Path(folder) / "store"), kind, rounds, size, answer), nprocs=WORLD)
        found: dict[str, list[float]] = answer.get()
    return found


def over(found: dict[str, list[float]], name: str, unit: str) -> str:
    """Median over the rounds of a contender's step over the unit's."""
    return f"{statistics.median(a / b for a, b in zip(found[name], found[unit], strict=True)):.2f}"


def main() -> None:
    """Measure, and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--batch", type=int, default=128, help="examples a rank")
    args = parser.parse_args()
    kinds = {"CPU, gloo": "cpu", "CUDA, NCCL": "cuda" if torch.cuda.device_count() >= WORLD else ""}
    found = {title: run(kind, args.rounds, args.batch) if kind else None for title, kind in kinds.items()}

    table = Table(box=box.MARKDOWN)
    headings = [f"{title}: {what}" for title in kinds for what in ("over SGD, DDP", "over SGD, one rank", "ms")]
    for heading in ("step on two ranks", "limit over DDP", "paper over one rank", *headings):
        table.add_column(heading, no_wrap=True)
    for name in (ONE, APART, UNIT, *METHODS):
        cells = [f"{where[name]:.2f}" if name in where else "" for where in (LIMITS, PAPER)]
        for times in found.values():
            if times is None:
                cells += ["not measured"] * 3
            else:
                milliseconds = statistics.median(times[name]) * 1e3
                cells += [over(times, name, UNIT), over(times, name, ONE), f"{milliseconds:.1f}"]
        table.add_row(name, *cells)
    console = Console(width=250)
    console.print(table)
    how = f"{WORLD} ranks of one thread, {args.batch} examples a rank, {args.rounds} rounds"
    console.print(f"\n`python benchmarks/ranks.py`, {how}; {described()}", soft_wrap=True)


if __name__ == "__main__":
    main()
