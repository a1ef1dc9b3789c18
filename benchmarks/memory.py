"""What a step needs in memory: each method's peak over plain SGD's, on one process and sharded over two.

    python benchmarks/memory.py

The network is a perceptron whose weights are a thousand times as large as its activations at a batch of two, so that
copies of the weights are what shows. A program makes network and optimizer and takes enough steps for every kind of
step to be among them, with all memories written. Its peak is counted from the allocator's events. Plain SGD, with
momentum, is the loop of torch's tutorials, without this library. Sharded (``fully_shard`` of every layer), the unit is
the rank's shard, and of the ranks the one that needs the most counts. Two sharded ranks on CUDA need two devices.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from machine import described
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import steppe
from steppe.lab.memory import peak_memory

METHODS = ["sam()", "esam()", "rwp()", "rwp(alpha=0)", "gsam()", "looksam(k=5)"]
SGD = "plain SGD itself"
WIDTH, DEPTH, EXAMPLES, STEPS, WORLD = 512, 12, 2, 11, 2
Peaks = dict[str, float]
"""Peak memory of plain SGD, and of each method beyond it, in copies of the weights or of the rank's shard."""


def network(device: str, sharded: bool) -> nn.Module:
    """Linear layers with ReLU between them; no rank ever holds more than one layer in full."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(DEPTH):
        layer = nn.Linear(WIDTH, WIDTH, device=device)
        layers += [fully_shard(layer) if sharded else layer, nn.ReLU()]
    return fully_shard(nn.Sequential(*layers)) if sharded else nn.Sequential(*layers)


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Loss of each example."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def train(text: str | None, device: str, sharded: bool) -> None:
    """Take some steps of a method, or of plain SGD without this library."""
    model = network(device, sharded)
    batch = torch.randn(EXAMPLES, WIDTH, device=device), torch.randint(WIDTH, (EXAMPLES,), device=device)
    base = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    opt = None if text is None else steppe.SharpnessAware(base, steppe.parse(text))
    for _ in range(STEPS):
        if opt is not None:
            opt.step(steppe.Batch(model, losses, batch))
            continue
        base.zero_grad()
        losses(model, batch).mean().backward()
        base.step()


def measure(device: str, sharded: bool) -> Peaks:
    """Peaks of all methods on this process."""
    size = 4 * DEPTH * (WIDTH + 1) * WIDTH / (WORLD if sharded else 1)
    peak = {}
    for text in [None, *METHODS]:
        train(text, device, sharded)  # libraries take their workspaces
        peak[text] = peak_memory(partial(train, text, device, sharded), device) / size
    return {SGD: peak[None], **{text: peak[text] - peak[None] for text in METHODS}}


def rank(number: int, device: str, folder: str) -> None:
    """Measure on one of the ranks."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo" if device == "cpu" else "nccl", store=store, rank=number, world_size=WORLD)
    if device == "cuda":
        torch.cuda.set_device(number)
    torch.save(measure(device, sharded=True), Path(folder) / f"{number}.pt")
    dist.destroy_process_group()


def sharded(device: str) -> Peaks:
    """The largest peaks over two ranks."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank, (device, folder), WORLD)
        ranks = [torch.load(Path(folder) / f"{number}.pt") for number in range(WORLD)]
    return {name: max(each[name] for each in ranks) for name in ranks[0]}


def main() -> None:
    """Measure, and print the table as Markdown."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    columns: dict[str, Peaks | None] = {
        "CPU, one process": measure("cpu", sharded=False),
        "CPU, two ranks, of the shard": sharded("cpu"),
        "CUDA, one process": measure("cuda", sharded=False) if torch.cuda.is_available() else None,
        "CUDA, two ranks, of the shard": sharded("cuda") if torch.cuda.device_count() >= WORLD else None,
    }
    console = Console(width=200)
    table = Table(box=box.MARKDOWN)
    for heading in ("peak memory beyond plain SGD's, copies of the weights", *columns):
        table.add_column(heading)
    for name in [*METHODS, SGD]:
        form = "{:.2f}" if name == SGD else "{:+.2f}"
        cells = ["not measured" if peaks is None else form.format(peaks[name]) for peaks in columns.values()]
        table.add_row(name, *cells)
    console.print(table)
    console.print(f"\n`python benchmarks/memory.py`, {described()}")


if __name__ == "__main__":
    main()
