"""The neural tangent kernel and its condition number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import checks
from ..examples import extent, take
from .axes import given_or_new
from .objective import FORWARD, Objective
from .products import cut

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Kernel:
    """What `ntk` found."""

    kernel: Tensor
    """Θ, float64 on the CPU, shape (N·C, N·C): example by example, and within one output by output."""
    eigenvalues: Tensor
    """Of Θ, the largest first."""
    rank: int
    """Eigenvalues that are told from 0 at the precision of the gradients, the largest times (N·C)·eps."""
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
        ``1/3 + 2C/3`` for each example, so ``N (1 + 2C)/3`` gradients of one example. Memory: N·C times the weights.

    Source:
        Jacot et al. 2018, "Neural tangent kernel"; its κ as in Chen et al. 2022, "When vision transformers outperform
        ResNets without pretraining or strong data augmentations", table 1.
    """
    checks.count(examples=examples)
    if objective.mode == "train":
        raise ValueError('the kernel needs outputs that depend on their own example only: mode="eval"')
    rows: list[list[Tensor]] = []
    with objective.still(), torch.enable_grad():
        before, wanted = objective.passes, min(examples, objective.examples)
        for i, example in enumerate(_first(objective, wanted)):
            rows += _jacobian(objective, example, outputs)
            progress((i + 1) / wanted)
    kernel = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for column in zip(*rows, strict=True):
        part = torch.stack([each.flatten() for each in column]).cpu().double()
        kernel += part @ part.T
    eigenvalues = torch.linalg.eigvalsh(kernel).flip(0)
    noise = eigenvalues[0].clamp(min=0) * len(rows) * torch.finfo(objective.dtype).eps
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


def _jacobian(objective: Objective, example: Any, outputs: Sequence[int] | None) -> list[list[Tensor]]:
    """Return the gradient of each output by each parameter."""
    found, leaves, losses = cut(objective, example)
    used = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
    flat = torch.cat([z.flatten() for z, slope in zip(found, used, strict=True) if slope is not None])
    chosen = range(len(flat)) if outputs is None else outputs
    if not len(chosen) or not all(-len(flat) <= c < len(flat) for c in chosen):
        raise ValueError(f"outputs={outputs!r}: an example has {len(flat)} outputs, and at least one must be chosen")
    objective.count(FORWARD + 2 / 3 * len(chosen), 1)
    return [
        list(torch.autograd.grad(flat[c], objective.params, retain_graph=True, materialize_grads=True)) for c in chosen
    ]
