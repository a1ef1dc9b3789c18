"""What curvature costs: products and λmax over a gradient's time and memory, beside curvlinops and SciPy's eigsh.

    python benchmarks/curvature.py [--rounds N] [--seeds N]

The networks are a BatchNorm ResNet and a vision transformer, in eval mode on one batch: untrained, and after 200 steps
on the digits, enlarged to 32×32, with a fifth of the labels wrong, so that they are still learning. The unit is the
gradient that anybody would take: a forward pass with torch's attention as it comes, and ``autograd.grad`` of the mean.

Products (of the trained network) alternate in every round, in an order that is shuffled; each time is divided by the
gradient's in the same round, and the median taken. λmax is asked for to 1 %: of steppe by its bound, from random
starts, the making of the graph included, the median taken over the seeds and the worst bound and error; of curvlinops
by ``eigsh(k=1, tol=1e-2)``. Errors are against steppe's at ``tol=1e-5``. Peak memory is that of two products over that
of a gradient, from the allocator's own events. Times are processor times of one thread: work beside it is not counted,
though what it does to the caches is.

glibc's malloc gives memory back to the system after a product and has it zeroed anew for the next, unless told to keep
it. The first measurement tells it so (`steppe.curvature.heap`), for all contenders; to see how much that is, start with
``MALLOC_TRIM_THRESHOLD_=131072 MALLOC_MMAP_THRESHOLD_=131072`` before the command, and nothing is kept.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from curvlinops import GGNLinearOperator, HessianLinearOperator
from rich import box
from rich.console import Console
from rich.table import Table
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from machine import described
from steppe.curvature.eigenvalues import eigenvalues
from steppe.curvature.objective import Objective
from steppe.curvature.operator import Kind, Operator
from steppe.lab import data
from steppe.lab.memory import peak_memory
from steppe.lab.models.resnet import ResNet18
from steppe.lab.models.vit import ViT

STEPS, NOISE, TOL = 200, 0.2, 1e-2
Column = dict[str, str]
"""What was measured on one network: the rows' names and their cells."""


@dataclass(frozen=True)
class Case:
    """A network, how it is trained, and what is asked of it."""

    title: str
    network: Callable[[], nn.Module]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    examples: int
    limits: dict[str, float]


CASES = [
    Case(
        "ResNet-18, width 5, 64 images",
        lambda: ResNet18(width=5),
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        64,
        {"Hessian, graph reused": 2.7, "Hessian": 3.8, "λmax": 40, "memory": 4},
    ),
    Case(
        "ViT, width 128, depth 3, 32 images",
        lambda: ViT(width=128, depth=3),
        lambda params: torch.optim.AdamW(params, lr=3e-4, weight_decay=0.05),
        32,
        {"Hessian, graph reused": 2.3, "Hessian": 3.3, "λmax": 20, "memory": 4},
    ),
]


def digits() -> tuple[Tensor, Tensor]:
    """The digits as images (1000, 3, 32, 32), and their labels, a fifth of them wrong."""
    found = data.load("digits", label_noise=NOISE)
    images = (found.train.images / 255 - found.mean[0]) / found.std[0]
    return F.interpolate(images, (32, 32), mode="bilinear").expand(-1, 3, -1, -1).contiguous(), found.train.labels


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Loss of each example."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Bench:
    """One network on one batch, and the contenders on it."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case, self.model = case, case.network().eval()
        self.images, self.labels = digits()
        self.x, self.y = self.images[: case.examples], self.labels[: case.examples]
        self.params = list(self.model.parameters())
        self.vector = torch.randn(sum(p.numel() for p in self.params))

    def train(self) -> None:
        """Take the steps, and return to eval mode."""
        optimizer, draws = self.case.optimizer(self.params), torch.Generator().manual_seed(1)
        self.model.train()
        for _ in range(STEPS):
            rows = torch.randint(len(self.labels), (self.case.examples,), generator=draws)
            optimizer.zero_grad()
            F.cross_entropy(self.model(self.images[rows]), self.labels[rows]).backward()
            optimizer.step()
        optimizer.zero_grad()
        self.model.eval()

    def gradient(self) -> None:
        """The unit."""
        torch.autograd.grad(F.cross_entropy(self.model(self.x), self.y), self.params)

    def ours(self, kind: Kind, *, reuse: bool) -> Operator:
        """A matrix of this library."""
        return Operator(Objective(self.model, losses, [(self.x, self.y)]), kind, reuse=reuse)

    def theirs(self, kind: Kind) -> Any:
        """The same matrix of curvlinops, without its check of the data."""
        made = {"hessian": HessianLinearOperator, "ggn": GGNLinearOperator}[kind]
        batch = [(self.x, self.y)]
        return made(self.model, nn.CrossEntropyLoss(), self.params, batch, check_deterministic=False)

    def products(self, rounds: int) -> Column:
        """Time of each contender's product over a gradient's."""
        matrices: dict[str, Any] = {
            "Hessian, graph reused": self.ours("hessian", reuse=True),
            "Hessian": self.ours("hessian", reuse=False),
            "Hessian, curvlinops": self.theirs("hessian"),
            "GGN, graph reused": self.ours("ggn", reuse=True),
            "GGN": self.ours("ggn", reuse=False),
            "GGN, curvlinops": self.theirs("ggn"),
        }
        found, seconds = {name: list[float]() for name in matrices}, list[float]()
        programs: dict[str, Callable[[], object]] = {name: partial(self.product, A) for name, A in matrices.items()}
        programs["gradient"] = self.gradient
        order, shuffle = list(programs), random.Random(0)
        for turn in range(rounds + 1):
            shuffle.shuffle(order)
            times = {name: timed(programs[name]) for name in order}
            if turn:  # in the first, graphs are made and caches warm up
                seconds.append(times["gradient"])
                for name in matrices:
                    found[name].append(times[name] / times["gradient"])
        column = {f"product: {name}": self._beside(statistics.median(each), name) for name, each in found.items()}
        right, other = self.product(matrices["Hessian"]), self.product(matrices["Hessian, curvlinops"])
        off = float(torch.linalg.vector_norm(other - right) / torch.linalg.vector_norm(right))
        column["product: Hessian, curvlinops"] += f", off by {off:.0e}"
        return {**column, "gradient, ms": f"{statistics.median(seconds) * 1e3:.1f}"}

    def product(self, matrix: Any) -> Tensor:
        """A product, under the math kernel of attention, without which curvlinops cannot do it."""
        with sdpa_kernel(SDPBackend.MATH):
            found: Tensor = matrix @ self.vector
            return found

    def largest(self, seeds: int) -> str:
        """Time of λmax over a gradient's, and how right it is."""
        value, found, times, units = self.true(), [], list[float](), [timed(self.gradient)]
        for seed in range(seeds):
            start = time.process_time()
            found.append(eigenvalues(self.ours("hessian", reuse=True), tol=TOL, seed=seed))
            times.append(time.process_time() - start)
            units.append(timed(self.gradient))
        products = statistics.median(each.products for each in found)
        bound = max(float(each.bounds[0] / each.values[0]) for each in found)
        error = max(abs(float(each.values[0]) / value - 1) for each in found)
        return (
            f"{self._beside(statistics.median(times) / statistics.median(units), 'λmax', digits=1)}: {products:.0f} "
            f"products, bound {bound:.0e}, error {error:.0e}"
            + ("" if all(each.converged.all() for each in found) else ", not converged")
        )

    def eigsh(self) -> str:
        """The same of curvlinops and SciPy."""
        value, units, found = self.true(), [timed(self.gradient) for _ in range(3)], list[float]()

        def program() -> None:
            with sdpa_kernel(SDPBackend.MATH):
                matrix = self.theirs("hessian").to_scipy()
                found.extend(eigsh(matrix, k=1, tol=TOL, which="LA", return_eigenvectors=False))

        taken = timed(program) / statistics.median(units)
        return f"{taken:.1f}: error {abs(found[0] / value - 1):.0e}"

    def true(self) -> float:
        """λmax, for comparison."""
        found = eigenvalues(self.ours("hessian", reuse=True), tol=1e-5)
        assert found.converged.all()
        return float(found.values[0])

    def memory(self) -> Column:
        """Peak of two products over that of a gradient."""
        unit = peak_memory(self.gradient)

        def peak(make: Callable[[], Any]) -> float:
            def program() -> None:
                matrix = make()
                for _ in range(2):
                    self.product(matrix)

            return peak_memory(program) / unit

        reused, anew = (peak(lambda reuse=reuse: self.ours("hessian", reuse=reuse)) for reuse in (True, False))
        return {
            "peak memory: Hessian, graph reused": self._beside(reused, "memory"),
            "peak memory: Hessian": self._beside(anew, "memory"),
            "peak memory: Hessian, curvlinops": f"{peak(lambda: self.theirs('hessian')):.2f}",
            "gradient, peak MB": f"{unit / 1e6:.1f}",
        }

    def _beside(self, figure: float, name: str, digits: int = 2) -> str:
        """The figure, and the limit where there is one."""
        limit = self.case.limits.get(name)
        return f"{figure:.{digits}f}" + (f" (limit {limit:g}{', missed' if figure > limit else ''})" if limit else "")


def timed(program: Callable[[], object]) -> float:
    """Seconds of processor time."""
    start = time.process_time()
    program()
    return time.process_time() - start


def measure(case: Case, rounds: int, seeds: int) -> Column:
    """All rows of a network."""
    bench = Bench(case)
    untrained = bench.largest(seeds)
    bench.train()
    return {
        **bench.products(rounds),
        "λmax to 1 %, trained": bench.largest(seeds),
        "λmax to 1 %, untrained": untrained,
        "λmax to 1 %, trained: curvlinops and eigsh": bench.eigsh(),
        **bench.memory(),
    }


def main() -> None:
    """Measure, and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="of products")
    parser.add_argument("--seeds", type=int, default=3, help="starts of Lanczos")
    args = parser.parse_args()
    torch.set_num_threads(1)
    columns = {case.title: measure(case, args.rounds, args.seeds) for case in CASES}
    console = Console(width=200)
    table = Table(box=box.MARKDOWN)
    for heading in ("over a gradient", *columns):
        table.add_column(heading)
    for name in next(iter(columns.values())):
        table.add_row(name, *(column[name] for column in columns.values()))
    console.print(table)
    threshold = os.environ.get("MALLOC_TRIM_THRESHOLD_")
    kept = f"malloc keeps {threshold} bytes, " if threshold else ""
    console.print(
        f"\n`python benchmarks/curvature.py`, {kept}{described()}, curvlinops {version('curvlinops-for-pytorch')}, "
        f"SciPy {version('scipy')}"
    )


if __name__ == "__main__":
    main()
