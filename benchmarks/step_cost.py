"""What a step costs: each method's step over plain SGD's, all alternating in one process, beside the PyPI peers.

    python benchmarks/step_cost.py [--cases resnet vit mlp4 mlp64] [--rounds N] [--threads N]

In every round each contender takes a step (a block of five where steps are short, so that the caches are as in a
training), in an order that is shuffled. A step's time is divided by the median of plain SGD's in the same round, and
the median taken over all. Steps of RST and LookSAM with and without a second pass are told apart, and their medians
weighed by their stated shares, p and 1/k. Plain SGD is the loop of torch's tutorials, without this library. Peak memory
is that of a training step beyond plain SGD's, in copies of the weights.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import random
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytorch_optimizer
import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import steppe
from steppe.lab import models
from steppe.lab.memory import peak_memory

METHODS = {
    "sam": "sam()",
    "gsam": "gsam()",
    "rwp": "rwp()",
    "rst(sam, p=0.5)": "rst(sam(), p=0.5)",
    "looksam(k=5)": "looksam(k=5)",
    "esam(0.6, 0.5)": "esam(beta=0.6, gamma=0.5)",
}
LIMITS = {"sam": 2.05, "gsam": 2.10, "rwp": 2.10, "rst(sam, p=0.5)": 1.55, "looksam(k=5)": 1.25, "esam(0.6, 0.5)": 1.75}
K, P = 5, 0.5
Step = Callable[[], str]
"""One training step; returns what kind of step it was: "sharp" or "plain"."""


def perceptron() -> nn.Module:
    """784 - 512 - 512 - 10 with ReLU: 670 000 weights, a step of a few milliseconds."""
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


CASES: dict[str, tuple[str, Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    # name: title, network, shape of a batch, rounds, steps a block
    "resnet": ("ResNet-18, width 16, batch 128", lambda: models.build("resnet18", width=16), (128, 3, 32, 32), 25, 1),
    "vit": ("ViT, width 192, batch 32", lambda: models.build("vit", width=192), (32, 3, 32, 32), 20, 1),
    "mlp4": ("MLP 784-512-512-10, batch 4", perceptron, (4, 784), 100, 5),
    "mlp64": ("MLP 784-512-512-10, batch 64", perceptron, (64, 784), 100, 5),
}


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Loss of each example."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def fresh(network: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, float]]:
    """The network with the same weights for everybody, and the settings of SGD."""
    torch.manual_seed(0)
    return network().to(memory_format=torch.channels_last), {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}


def plain(network: Callable[[], nn.Module], x: Tensor, y: Tensor) -> Step:
    """Torch's own loop."""
    model, settings = fresh(network)
    optimizer = torch.optim.SGD(model.parameters(), **settings)

    def step() -> str:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return "plain"

    return step


def ours(network: Callable[[], nn.Module], x: Tensor, y: Tensor, text: str) -> Step:
    """A method of this library."""
    model, settings = fresh(network)
    opt = steppe.SharpnessAware(torch.optim.SGD(model.parameters(), **settings), steppe.parse(text))

    def step() -> str:
        sharp = opt.stats.sharp
        opt.step(steppe.Batch(model, losses, (x, y)))
        return "sharp" if opt.stats.sharp > sharp else "plain"

    return step


def peer(network: Callable[[], nn.Module], x: Tensor, y: Tensor, name: str) -> Step:
    """SAM or LookSAM of pytorch_optimizer, used as its documentation shows."""
    model, settings = fresh(network)
    extra = {"k": K} if name == "LookSAM" else {}
    opt = getattr(pytorch_optimizer, name)(model.parameters(), torch.optim.SGD, rho=0.05, **extra, **settings)
    taken = 0

    def closure() -> Tensor:
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    def step() -> str:
        nonlocal taken
        kind = "sharp" if taken % K == 0 else "plain"
        taken += 1
        closure()
        opt.step(closure)
        return kind

    return step


def shares(name: str) -> dict[str, float]:
    """Kinds of steps that are told apart, and the share of each."""
    if "looksam" in name.lower():
        return {"sharp": 1 / K, "plain": 1 - 1 / K}
    return {"sharp": P, "plain": 1 - P} if name.startswith("rst") else {"": 1.0}


def measure(case: str, rounds: int | None) -> dict[str, float]:
    """Ratio of each contender's step to plain SGD's, and plain SGD's seconds."""
    _, network, shape, default, block = CASES[case]
    torch.manual_seed(1)
    x, y = torch.randn(shape), torch.randint(10, shape[:1])
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    steps = {"sgd": plain(network, x, y), "sgd through steppe": ours(network, x, y, "sgd()")}
    steps |= {name: ours(network, x, y, text) for name, text in METHODS.items()}
    steps |= {f"pytorch_optimizer {name}": peer(network, x, y, name) for name in ("SAM", "LookSAM")}
    found = {(name, kind): list[float]() for name in steps for kind in shares(name)}
    seconds = []
    order, shuffle = list(steps), random.Random(0)
    for turn in range((rounds or default) + 1):
        shuffle.shuffle(order)
        taken = {name: [timed(steps[name]) for _ in range(block)] for name in order}
        if turn == 0:  # caches and thread pools warm up
            continue
        unit = statistics.median(each for each, _ in taken["sgd"])
        seconds.append(unit)
        for name, times in taken.items():
            for each, kind in times:
                found[name, kind if len(shares(name)) > 1 else ""].append(each / unit)
    if empty := [" ".join(key) for key, times in found.items() if not times]:
        raise SystemExit(f"no step was seen of {', '.join(empty)}: give more --rounds")
    del found["sgd", ""]
    ratios: dict[str, float] = {}
    for (name, kind), times in found.items():
        ratios[name] = ratios.get(name, 0.0) + shares(name)[kind] * statistics.median(times)
    return {**ratios, "seconds": statistics.median(seconds)}


def timed(step: Step) -> tuple[float, str]:
    """Seconds of a step, and its kind."""
    start = time.perf_counter()
    kind = step()
    return time.perf_counter() - start, kind


def memory(case: str) -> dict[str, float]:
    """Peak of two steps beyond plain SGD's, in copies of the weights."""
    _, network, shape, _, _ = CASES[case]
    x, y = torch.randn(shape), torch.randint(10, shape[:1])
    size = sum(p.numel() * p.element_size() for p in network().parameters())

    def program(make: Callable[[], Step]) -> Callable[[], None]:
        def run() -> None:
            step = make()
            for _ in range(2):
                step()

        return run

    base = peak_memory(program(lambda: plain(network, x, y)), "cpu")
    chosen: dict[str, Callable[[], Step]] = {
        "sam": lambda: ours(network, x, y, "sam()"),
        "gsam": lambda: ours(network, x, y, "gsam()"),
        "rwp": lambda: ours(network, x, y, "rwp()"),
        "looksam(k=5)": lambda: ours(network, x, y, "looksam(k=5)"),
        "esam(0.6, 0.5)": lambda: ours(network, x, y, "esam(beta=0.6, gamma=0.5)"),
        "pytorch_optimizer SAM": lambda: peer(network, x, y, "SAM"),
        "pytorch_optimizer LookSAM": lambda: peer(network, x, y, "LookSAM"),
    }
    return {name: (peak_memory(program(make), "cpu") - base) / size for name, make in chosen.items()}


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    """Measure, and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, help="rounds a case; by default 20 to 100")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ratios = {case: measure(case, args.rounds) for case in args.cases}
    extra = {case: memory(case) for case in args.cases if case in ("resnet", "vit")}

    console = Console(width=200)
    table = Table(box=box.MARKDOWN)
    for heading in ("step over plain SGD's", "limit", *(CASES[case][0] for case in args.cases)):
        table.add_column(heading)
    for name in next(iter(ratios.values())):
        if name != "seconds":
            limit = f"{LIMITS[name]:.2f}" if name in LIMITS else ""
            table.add_row(name, limit, *(f"{ratios[case][name]:.2f}" for case in args.cases))
    table.add_row("plain SGD, ms", "", *(f"{ratios[case]['seconds'] * 1e3:.2f}" for case in args.cases))
    console.print(table)
    if extra:
        table = Table(box=box.MARKDOWN)
        for heading in ("peak memory beyond plain SGD's, copies of the weights", *(CASES[case][0] for case in extra)):
            table.add_column(heading)
        for name in next(iter(extra.values())):
            table.add_row(name, *(f"{extra[case][name]:+.2f}" for case in extra))
        console.print(table)
    today = datetime.date.today().isoformat()
    console.print(
        f"\n`python benchmarks/step_cost.py`, {today}, {cpu()}, {args.threads} threads, Python "
        f"{platform.python_version()}, torch {torch.__version__}, pytorch_optimizer {version('pytorch_optimizer')}"
    )


if __name__ == "__main__":
    main()
