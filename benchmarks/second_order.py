"""What a step of a second-order base costs: over plain SGD's, all alternating in one process.

    python benchmarks/second_order.py [--cases resnet20 vit] [--rounds N] [--threads N]

In every round each contender takes one step, in an order that is shuffled; a round is one of N = 100, the period of
K-FAC's inverses. A step's time is divided by plain SGD's in the same round. Of these ratios, steps of one kind have one
median, and the kinds are weighed by their shares: AdaHessian with n = 5 has a product on every fifth step; K-FAC has
new factors on every 10th and new inverses on every 100th, and the first round has both. Plain SGD is the loop of
torch's tutorials, without this library, and with torch's fused attention. One contender goes without `steppe.twice`:
its double backward of convolutions and batch norm is torch's own.

The second table is the error of the product that is taken as a difference of two gradients, against the exact one with
the same probes: ‖D' − D‖/‖D‖ of the diagonal that is made of it (averaged in space), in float32, in training mode, for
both networks as they come and after a few steps.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import steppe
from machine import described
from steppe.lab import models
from steppe.second_order import SecondOrder
from steppe.twice import REPLACED

LIMITS = {
    "AdaHessian, n=1": {"resnet20": 3.8, "vit": 3.4},
    "AdaHessian, n=5": {"resnet20": 1.6, "vit": 1.6},
    "AdaHessian, n=1, difference": {"resnet20": 2.2, "vit": 2.2},
    "K-FAC, n=10, n_inverse=100": {"resnet20": 1.5, "vit": 1.5},
}
CASES: dict[str, tuple[str, Callable[[], nn.Module], int]] = {
    "resnet20": ("ResNet-20, batch 128", lambda: models.build("resnet20"), 128),
    "vit": ("ViT, width 192, batch 32", lambda: models.build("vit", width=192), 32),
}
LONG = "AdaHessian, n=1, without steppe.twice"
WARM = 10
"""Steps of AdaHessian before the second error is taken."""


def contenders() -> dict[str, Callable[[Any], SecondOrder]]:
    """The bases, by the names of their rows."""
    return {
        "AdaHessian, n=1": lambda params: steppe.optim.AdaHessian(params, lr=1e-3),
        LONG: lambda params: steppe.optim.AdaHessian(params, lr=1e-3),
        "AdaHessian, n=5": lambda params: steppe.optim.AdaHessian(params, lr=1e-3, n=5),
        "AdaHessian, n=1, difference": lambda params: steppe.optim.AdaHessian(params, lr=1e-3, product="difference"),
        "K-FAC, n=10, n_inverse=100": lambda params: steppe.optim.NaturalGradient(
            params, lr=1e-4, fisher="kfac", n=10, n_inverse=100
        ),
    }


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Loss of each example."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def fresh(case: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The network with the same weights for everybody, and the batch."""
    _, network, size = CASES[case]
    torch.manual_seed(0)
    model = network().to(memory_format=torch.channels_last)
    x = torch.randn(size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    return model, (x, torch.randint(10, (size,)))


def plain(case: str) -> Callable[[], str]:
    """Torch's own loop with SGD."""
    model, (x, y) = fresh(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)

    def step() -> str:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        return ""

    return step


def ours(case: str, make: Callable[[Any], SecondOrder], short: bool) -> Callable[[], str]:
    """A second-order base alone, with the short double backward or without; a step's kind is what it had to look at."""
    model, batch = fresh(case)
    base = make(model.parameters())
    inverse = getattr(base, "n_inverse", 1)

    def step() -> str:
        number = base.steps
        with nullcontext() if short else patch.dict(REPLACED, clear=True):
            base.step(steppe.Batch(model, losses, batch))
        if number % base.n:
            return "between"
        return "inverses" if inverse > 1 and number % inverse == 0 else "look"

    return step


def shares(name: str) -> dict[str, float]:
    """The kinds of steps and how many of them are of each."""
    if name.startswith("K-FAC"):
        return {"inverses": 0.01, "look": 0.09, "between": 0.9}
    return {"look": 0.2, "between": 0.8} if "n=5" in name else {"look": 1.0}


def measure(case: str, rounds: int) -> dict[str, float]:
    """Each contender's step over plain SGD's, and plain SGD's seconds."""
    steps = {"sgd": plain(case), **{name: ours(case, make, name != LONG) for name, make in contenders().items()}}
    found: dict[tuple[str, str], list[float]] = {}
    seconds = []
    plain(case)()  # thread pools warm up
    order, shuffle = list(steps), random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        taken = {name: timed(steps[name]) for name in order}
        unit = taken.pop("sgd")[0]
        seconds.append(unit)
        for name, (each, kind) in taken.items():
            found.setdefault((name, kind), []).append(each / unit)
    ratios = {
        name: sum(share * statistics.median(found[name, kind]) for kind, share in shares(name).items())
        for name in contenders()
    }
    return {**ratios, "plain SGD, ms": 1e3 * statistics.median(seconds)}


def timed(step: Callable[[], str]) -> tuple[float, str]:
    """Seconds of a step, and its kind."""
    start = time.perf_counter()
    kind = step()
    return time.perf_counter() - start, kind


def errors(case: str) -> dict[str, float]:
    """Relative errors of the diagonal by a difference of gradients, before and after a few steps."""
    model, data = fresh(case)
    exact = steppe.optim.AdaHessian(model.parameters(), lr=1e-2)
    found = {}
    for when, steps in (("as it comes", 0), (f"after {WARM} steps", WARM)):
        for _ in range(steps):
            exact.step(steppe.Batch(model, losses, data))
        both = []
        for product in ("exact", "difference"):
            base = steppe.optim.AdaHessian(model.parameters(), lr=0.0, n=2, product=product)  # type: ignore[arg-type]
            base.step(steppe.Batch(model, losses, data))
            both.append(torch.cat([base.state[p]["diagonal"].flatten() for p in model.parameters()]))
        found[when] = float((both[1] - both[0]).norm() / both[0].norm())
    return found


def main() -> None:
    """Measure, and print the tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=100, help="steps of each contender; default 100")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if args.rounds < 11:
        parser.error("--rounds must be at least 11, so that every kind of step is seen")
    torch.set_num_threads(args.threads)
    ratios = {case: measure(case, args.rounds) for case in args.cases}
    apart = {case: errors(case) for case in args.cases}
    console = Console(width=200)
    table = Table(box=box.MARKDOWN)
    table.add_column("step over plain SGD's")
    for case in args.cases:
        table.add_column(CASES[case][0])
        table.add_column("limit")
    for name in [*contenders(), "plain SGD, ms"]:
        cells = [(f"{ratios[case][name]:.2f}", str(LIMITS.get(name, {}).get(case, ""))) for case in args.cases]
        table.add_row(name, *(cell for pair in cells for cell in pair))
    console.print(table)
    table = Table(box=box.MARKDOWN)
    for heading in ("relative error of the difference", *(CASES[case][0] for case in args.cases)):
        table.add_column(heading)
    for when in next(iter(apart.values())):
        table.add_row(when, *(f"{apart[case][when]:.2g}" for case in args.cases))
    console.print(table)
    console.print(f"\n`python benchmarks/second_order.py`, {described()}, {args.threads} threads")


if __name__ == "__main__":
    main()
