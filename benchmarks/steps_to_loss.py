"""Steps and seconds to a fixed training loss: second-order bases against SGD and AdamW, tuned alike.

    python benchmarks/steps_to_loss.py [--cases digits cifar10] [--seeds N] [--threads N]

The loss is that of the training batches as they were trained on, in training mode, averaged over the last pass through
the images; the learning rate is constant, there is no weight decay and no augmentation. Every base is given six
settings. Each runs once with a seed of its own (100), until it is slower than the best so far; the setting that gets
there in the fewest steps is then run with the seeds 0, 1, ... of the table. All bases of a seed start from the same
weights and see the same batches. Nothing is said of accuracy: test images take no part.

The digits are scikit-learn's 1 000 training images without label noise, batch 64, the small convolutional network. Of
CIFAR-10 (which lies in ../shared/data/cifar10) there are 1 000 images, batch 64, a ResNet-20 of half its width. Seconds
are processor time, of one thread if nothing else is asked for.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import steppe
from machine import described
from steppe.lab import bases, data, models
from steppe.lab.augment import normalize
from steppe.lab.config import Config
from steppe.lab.progress import Bar
from steppe.lab.stats import estimate

TUNING = 100
"""Seed on which settings are chosen."""
BATCH = 64
GRIDS = {
    "sgd": [f"sgd(lr={lr})" for lr in (0.01, 0.03, 0.1, 0.2, 0.4, 0.8)],
    "adamw": [f"adamw(lr={lr})" for lr in (3e-4, 1e-3, 3e-3, 6e-3, 1e-2, 3e-2)],
    "adahessian": [f"adahessian(lr={lr})" for lr in (0.01, 0.03, 0.1, 0.15, 0.3, 0.6)],
    "adahessian, n=5": [f"adahessian(lr={lr}, n=5)" for lr in (0.01, 0.03, 0.1, 0.15, 0.3, 0.6)],
    "kfac": [f"kfac(lr={lr}, damping={damping})" for lr in (0.01, 0.03, 0.1) for damping in (0.01, 0.1)],
    "ekfac": [f"ekfac(lr={lr}, damping={damping})" for lr in (0.01, 0.03, 0.1) for damping in (0.01, 0.1)],
}


@dataclass(frozen=True)
class Case:
    """Images, a network, the loss to be reached, and the steps after which one gives up."""

    title: str
    source: str
    images: int | None
    network: str
    width: int | None
    target: float
    most: int


CASES = {
    "digits": Case("digits, CNN, training loss 0.05", "digits", None, "cnn", None, 0.05, 800),
    "cifar10": Case(
        "CIFAR-10, 1 000 images, ResNet-20 of width 8, training loss 1.5",
        "../shared/data/cifar10", 1000, "resnet20", 8, 1.5, 400,
    ),
}  # fmt: skip


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Loss of each example."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def batches(images: Tensor, labels: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end: each pass through the images in another order, what does not fill a batch left out."""
    draws = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(labels), generator=draws)
        for rows in order[: len(order) // BATCH * BATCH].split(BATCH):
            yield images[rows].contiguous(memory_format=torch.channels_last), labels[rows]


def run(case: Case, base: str, seed: int, most: int) -> tuple[int, float, float] | None:
    """Steps, seconds and propagations a step until the loss is reached; None if ``most`` steps are too few."""
    dataset = data.load(case.source, seed=seed, train_size=case.images, label_noise=0.0)
    images = normalize(dataset.train.images, dataset.mean, dataset.std)
    torch.manual_seed(seed)
    size = images.shape[-1]
    model = models.build(
        case.network, classes=dataset.classes, channels=dataset.channels, size=size, width=case.width
    ).to(memory_format=torch.channels_last)
    config = Config(base=base, seed=seed, weight_decay=0.0)
    opt = steppe.SharpnessAware(bases.build(config, model.parameters()), steppe.sgd())
    turn = len(images) // BATCH
    seen: list[float] = []
    start = time.process_time()
    for number, batch in enumerate(batches(images, dataset.train.labels, seed), 1):
        try:
            seen.append(float(opt.step(steppe.Batch(model, losses, batch))))
        except ValueError:  # diverged
            return None
        if number >= turn and math.fsum(seen[-turn:]) / turn <= case.target:
            return number, time.process_time() - start, opt.stats.propagations
        if number == most:
            return None
    raise AssertionError


def chosen(case: Case, grid: list[str], bar: Bar) -> str | None:
    """The setting that needs the fewest steps on the tuning seed."""
    best, steps = None, case.most
    for base in grid:
        found = run(case, base, TUNING, steps)
        if found is not None and (best is None or found[0] < steps):
            best, steps = base, found[0]
        bar.piece(f"{case.title} · {base}", 1)(1.0)
    return best


def row(case: Case, name: str, seeds: int, bar: Bar) -> list[str]:
    """What the table says of one base."""
    base = chosen(case, GRIDS[name], bar)
    if base is None:
        return [name, "none", f"> {case.most}", "", ""]
    found = [run(case, base, seed, case.most) for seed in range(seeds)]
    bar.piece(f"{case.title} · {base}, all seeds", 3)(1.0)
    reached = [each for each in found if each is not None]
    if len(reached) < seeds:
        return [name, base, f"> {case.most} on {seeds - len(reached)} of {seeds} seeds", "", ""]
    steps, seconds = (estimate([each[i] for each in reached]) for i in (0, 1))
    return [
        name,
        base,
        f"{steps.mean:.0f} ± {steps.half or math.nan:.0f}",
        f"{seconds.mean:.1f} ± {seconds.half or math.nan:.1f}",
        f"{estimate([each[2] for each in reached]).mean:.2f}",
    ]


def main() -> None:
    """Measure, and print the tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--bases", nargs="+", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console = Console(width=200)
    for case in map(CASES.__getitem__, args.cases):
        table = Table(box=box.MARKDOWN, title=case.title)
        for heading in ("base", "best of six settings", "steps", "seconds of processor time", "propagations / step"):
            table.add_column(heading)
        with Bar(sum(len(GRIDS[name]) + 3 for name in args.bases)) as bar:
            for name in args.bases:
                cells = row(case, name, args.seeds, bar)
                bar.say(" · ".join(cells))
                table.add_row(*cells)
        console.print(table)
    console.print(f"\n`python benchmarks/steps_to_loss.py`, {described()}, {args.threads} threads, {args.seeds} seeds")


if __name__ == "__main__":
    main()
