"""What a step needs in memory: each method's peak over plain SGD's, on one process and sharded over two ranks.

    python benchmarks/memory.py

The network is a perceptron with 16 layers whose weights are far larger than its activations, so that copies of the
weights are what shows. A program makes network and optimizer, and takes steps until momentum and memories are there and
a sharp step has met them. Plain SGD, with momentum, is the loop of torch's tutorials, without this library. Sharded
(``fully_shard`` of every layer) the unit is the rank's shard, and the larger of the two ranks' figures counts.

On one process the peak is that of the allocator's own events. Gloo frees buffers in threads which those leave out, so
on CPU ranks the storages that are alive are summed after every operation; a buffer that gloo still holds makes these
figures uncertain by a layer's share, 0.06. Two sharded ranks on CUDA need two devices.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, UntypedStorage, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import steppe
from machine import described
from steppe.lab.memory import peak_memory

METHODS = {"sam()": 3, "esam()": 6, "rwp()": 3, "rwp(alpha=0)": 3, "gsam()": 3, "looksam(k=5)": 6}
"""Steps until every kind of step was taken."""
SGD = "plain SGD itself"
WIDTH, DEPTH, EXAMPLES, WORLD = 256, 16, 2, 2
Peaks = dict[str, float]
"""Peak memory of plain SGD, and of each method beyond it, in copies of the weights or of the rank's shard."""


def network(device: str, sharded: bool) -> nn.Module:
    """Linear layers with ReLU between them; where sharded, no rank ever holds all of them in full."""
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
    for _ in range(3 if text is None else METHODS[text]):
        if opt is not None:
            opt.step(steppe.Batch(model, losses, batch))
            continue
        base.zero_grad()
        losses(model, batch).mean().backward()
        base.step()


class Held(TorchDispatchMode):
    """The most bytes that were alive at once after an operation, of the storages that operations returned."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, weakref.ref[UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count; one on sharded tensors comes back as those on the shards."""
        if DTensor in types:
            return NotImplemented
        returned = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(returned) if isinstance(t, Tensor)):
            self._alive[storage._cdata] = weakref.ref(storage)
        alive = {key: storage for key, ref in self._alive.items() if (storage := ref()) is not None}
        self._alive = {key: self._alive[key] for key in alive}
        self.peak = max(self.peak, sum(storage.nbytes() for storage in alive.values()))
        return returned


def peak_of_rank(program: Callable[[], object], device: str) -> int:
    """Peak bytes of what ``program`` allocates, also where other threads free some of it."""
    if device == "cuda":
        return peak_memory(program, device)
    gc.collect()
    with Held() as held:
        program()
    return held.peak


def measure(device: str, sharded: bool) -> Peaks:
    """Peaks of all methods on this process."""
    size = 4 * DEPTH * (WIDTH + 1) * WIDTH / (WORLD if sharded else 1)
    of = peak_of_rank if sharded else peak_memory
    train(None, device, sharded)  # libraries take their workspaces
    peak = {text: of(partial(train, text, device, sharded), device) / size for text in [None, *METHODS]}
    return {SGD: peak[None], **{text: peak[text] - peak[None] for text in METHODS}}


def rank(number: int, device: str, folder: str) -> None:
    """Measure on one of the ranks."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(number)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=number, world_size=WORLD)
    torch.save(measure(device, sharded=True), Path(folder) / f"{number}.pt")
    dist.destroy_process_group()


def measure_ranks(device: str) -> Peaks:
    """Peaks of all methods, the larger of two ranks'."""
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
        "CPU, two ranks, of the shard": measure_ranks("cpu"),
        "CUDA, one process": measure("cuda", sharded=False) if torch.cuda.is_available() else None,
        "CUDA, two ranks, of the shard": measure_ranks("cuda") if torch.cuda.device_count() >= WORLD else None,
    }
    console = Console(width=200)
    table = Table(box=box.MARKDOWN)
    for heading in ("peak memory beyond plain SGD's, copies of the weights", *columns):
        table.add_column(heading)
    for name in [*METHODS, SGD]:
        form = "{:.2f}" if name == SGD else "{:+.2f}"
        table.add_row(name, *("not measured" if each is None else form.format(each[name]) for each in columns.values()))
    console.print(table)
    console.print(f"\n`python benchmarks/memory.py`, {described()}")


if __name__ == "__main__":
    main()
