"""The neural tangent kernel and its condition number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..examples import extent, take
from .axes import given_or_new
from .objective import FORWARD, Objective, widest
from .products import cut

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Place: TypeAlias = tuple[int, int]
"""Of a row of J: the example, and the output's place among those chosen."""
ROOM = 2**28
"""Entries of J that are held at a time, twice."""


@dataclass(frozen=True)
class Kernel:
    """What `ntk` found."""

    kernel: Tensor
    """Θ, float64 on the CPU, shape (N·C, N·C): example by example, and within one output by output."""
    eigenvalues: Tensor
    """Of Θ, the largest first."""
    rank: int
    """Eigenvalues told from 0: above ``(N·C·eps)²`` of the largest, since J's singular values are their roots."""
    examples: int
    """N."""
    passes: float

    @property
    def singular(self) -> bool:
        """Whether the smallest eigenvalue is not told from 0."""
        return self.rank < len(self.eigenvalues)

    @property
    def condition(self) -> float:
        """κ = λmax/λmin; infinite if the kernel is singular."""
        return math.inf if self.singular else float(self.eigenvalues[0] / self.eigenvalues[-1])

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the eigenvalues in order on a logarithmic scale; of those not told from 0 the magnitude, hollow."""
        axes = given_or_new(axes)
        places, sizes = range(1, len(self.eigenvalues) + 1), self.eigenvalues.abs().tolist()
        axes.plot(places[: self.rank], sizes[: self.rank], "o", color="C0", label=f"κ = {self.condition:.3g}")
        if self.singular:
            rest = places[self.rank :], sizes[self.rank :]
            axes.plot(*rest, "o", color="C0", markerfacecolor="none", label="not told from 0")
        axes.set_yscale("log", nonpositive="mask")
        axes.set_xlabel("number")
        axes.set_ylabel("eigenvalue of the kernel")
        axes.legend()
        return axes


def ntk(
    objective: Objective,
    examples: int = 16,
    *,
    outputs: Sequence[int] | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Kernel:
    """Compute the neural tangent kernel of the first examples, ``Θ = J Jᵀ``, and ``κ = λmax/λmin``.

    J has a row ``∂z_c(xᵢ)/∂w`` for each example i and output c of the model. Each is one backward pass of one example:
    plain reverse mode, right for every layer.

    Args:
        objective: gives the model, its parameters w and the data; of the model's outputs those count that ``loss_fn``
            uses.
        examples: N, of the first ones of this process; default 16, less if there are fewer.
        outputs: indices of the outputs of an example, laid flat; None for all C.
        progress: is told the share done.

    Raises:
        ValueError: if examples < 1, an output does not exist, the objective is in train mode, or its ``loss_fn`` does
            not call the model once.

    Cost:
        ``1/3 + 2C/3`` for each example, so ``N (1 + 2C)/3`` gradients of one example. Memory: J, up to 2²⁸ entries of
        it; of a larger J, rows are computed again, so that k times as many entries cost about (k + 1)/2 times as much.

    Source:
        Jacot et al. 2018, "Neural tangent kernel"; its κ as in Chen et al. 2022, "When vision transformers outperform
        ResNets without pretraining or strong data augmentations", table 1.
    """
    checks.count(examples=examples)
    if objective.mode == "train":
        raise ValueError('the kernel needs outputs that depend on their own example only: mode="eval"')
    with objective.still(), torch.enable_grad():
        before, wanted = objective.passes, min(examples, objective.examples)
        kernel = _kernel(objective, _first(objective, wanted), outputs, progress)
    eigenvalues, size = torch.linalg.eigvalsh(kernel).flip(0), len(kernel)
    least = max((size * torch.finfo(widest(objective.params)).eps) ** 2, size * torch.finfo(torch.float64).eps)
    noise = eigenvalues[0].clamp(min=0) * least
    return Kernel(kernel, eigenvalues, int((eigenvalues > noise).sum()), wanted, objective.passes - before)


def _first(objective: Objective, count: int) -> list[Any]:
    """Return the first examples, each as a batch of one."""
    found: list[Any] = []
    for batch in objective.batches():
        size, _ = extent(batch)
        found += [take(batch, slice(i, i + 1), size) for i in range(min(size, count - len(found)))]
        if len(found) == count:
            break
    return found


def _kernel(
    objective: Objective, examples: list[Any], outputs: Sequence[int] | None, progress: Callable[[float], None]
) -> Tensor:
    """Return ``J Jᵀ``, in strips: the products of some rows with themselves and all that follow."""
    room = max(1, ROOM // objective.size)
    strips: list[Tensor] = []
    start: Place | None = (0, 0)
    while start is not None:

        def tell(outputs: int, done: int, start: Place = start) -> None:
            """The share of the kernel's area that is done: in this strip, of what is from its start on."""
            size = outputs * len(examples)
            rest = size - outputs * start[0] - start[1]
            strip = rest**2 - max(0, rest - room) ** 2
            progress(1 - (rest**2 - strip * (1 - (size - outputs * done) / rest)) / size**2)

        rows = _rows(objective, examples, outputs, start, tell)
        first = list(islice(rows, room))
        blocks, start = [_product(first, first)], None
        while block := list(islice(rows, room)):
            start = start or block[0][0]
            blocks.append(_product(first, block))
        strips.append(torch.cat(blocks, 1))
    upper = torch.cat([F.pad(strip, (strips[0].shape[1] - strip.shape[1], 0)) for strip in strips])
    return upper.triu() + upper.triu(1).T


def _rows(
    objective: Objective,
    examples: list[Any],
    outputs: Sequence[int] | None,
    start: Place,
    tell: Callable[[int, int], None],
) -> Iterator[tuple[Place, list[Tensor]]]:
    """Give J's rows from a place on, parameter by parameter."""
    for i, example in enumerate(examples[start[0] :], start[0]):
        found, leaves, losses = cut(objective, example)
        objective.count(FORWARD, 1)
        used = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
        flat = torch.cat([z.flatten() for z, slope in zip(found, used, strict=True) if slope is not None])
        chosen = range(len(flat)) if outputs is None else outputs
        if not len(chosen) or not all(-len(flat) <= c < len(flat) for c in chosen):
            raise ValueError(
                f"outputs={outputs!r}: an example has {len(flat)} outputs, and at least one must be chosen"
            )
        for k, c in enumerate(chosen):
            if (i, k) >= start:
                objective.count(2 / 3, 1)
                slopes = torch.autograd.grad(flat[c], objective.params, retain_graph=True, materialize_grads=True)
                yield (i, k), list(slopes)
        tell(len(chosen), i + 1)


def _product(one: list[tuple[Place, list[Tensor]]], two: list[tuple[Place, list[Tensor]]]) -> Tensor:
    """Return the inner products of some rows with others, in double precision, a parameter at a time."""
    product = torch.zeros(len(one), len(two), dtype=torch.float64)
    for number in range(len(one[0][1])):
        a, b = (torch.stack([row[number].flatten() for _, row in rows]).cpu().double() for rows in (one, two))
        product += a @ b.T
    return product
