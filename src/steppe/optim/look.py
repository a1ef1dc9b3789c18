"""What the passes of a step show of the blocks of the Fisher matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor

from .. import vec
from ..batch import Batch
from ..curvature.products import Likelihood
from ..examples import extent
from . import layers
from .blocks import Block, Seen
from .diagonal import Diagonal, add_squares_, squares
from .found import State, accumulate
from .scores import Calls, noted, scores, used


class Look:
    """Estimates of the blocks, as means over the examples of one pass.

    The gradients of the scores are taken between the model's forward pass and the loss's backward pass, through the
    same graph, by the outputs of the layers: no weight gradient is computed but those of the diagonals.

    Args:
        blocks: of the model: those of layers first, then diagonals.
        labels: ``"model"`` for labels of its own, ``"data"`` for the gradients of the losses as they are.
        likelihood: what the outputs mean, for labels of the model's own.
        draws: labels drawn for each example, or None for their expectation, see `scores`; a diagonal then takes each
            example by itself, and so it does for ``labels="data"``.
        generator: draws the labels.
        keeps: whether the raw pieces are kept, for `LayerBlock.rescale`.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        labels: str,
        likelihood: Likelihood,
        draws: int | None,
        generator: Generator,
        keeps: bool,
    ) -> None:
        self.labels, self.likelihood, self.draws, self.generator = labels, likelihood, draws, generator
        self.layers: list[Any] = [block for block in blocks if not isinstance(block, Diagonal)]
        self.alone = [block.params[0] for block in blocks if isinstance(block, Diagonal)]
        self.estimates: list[State] = [{} for _ in blocks]
        self.kept: list[tuple[float, list[Seen]]] = []
        self.passes = 0.0
        """Backward passes for each example; one without weight gradients is half of one."""
        self._keeps = keeps

    @contextmanager
    def watching(self, batch: Batch, size: int) -> Iterator[None]:
        """Look at each micro-batch of a pass over so many examples."""
        plain = batch.loss_fn

        def watched(model: Any, data: Any) -> Tensor:
            count, device = extent(data)
            with torch.enable_grad():
                with layers.capture(self.layers, count) as seen, noted(model) as calls:
                    losses = plain(model, data)
                if isinstance(losses, Tensor) and losses.shape in ((), (count,)):  # else the batch says what is wrong
                    with torch.autocast(device.type, enabled=False):
                        self._take(seen, calls, losses, count, count / size)
            return losses if torch.is_grad_enabled() else losses.detach()

        batch.loss_fn = watched
        try:
            with torch.compiler.set_stance("force_eager"):  # compiled layers show no outputs
                yield
        finally:
            batch.loss_fn = plain

    def _take(self, seen: list[Seen], calls: Calls, losses: Tensor, count: int, share: float) -> None:
        """Add what one micro-batch shows."""
        apart = self.draws is None and bool(self.alone)
        if self.labels == "model":
            root = used(calls, losses, count, self.likelihood)
            slopes = [s.to(root.dtype) for s in scores(root, self.likelihood, self.draws, self.generator)]
        else:
            root, slopes = losses, [torch.full_like(losses, 1.0 if losses.ndim else count)]
            if apart and not losses.ndim:
                raise TypeError("draws=None takes each example by itself: let loss_fn return shape (B,), as "
                                "reduction='none' does, or take draws=1")  # fmt: skip
        totals = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in self.alone]
        inputs: list[Any] = [*(edge for each in seen for edge in each.edges), *([] if apart else self.alone)]
        for slope in slopes:
            found = (
                list(torch.autograd.grad(root, inputs, slope, retain_graph=True, allow_unused=True)) if inputs else []
            )
            for each in seen:
                each.gradients.append([found.pop(0) for _ in each.edges])
            if apart:
                vec.add_(totals, squares(root, slope, self.alone))
            else:
                add_squares_(totals, found)
        for each in seen:
            each.edges = []  # they hold the graph
        estimates = [
            *(block.estimate(each) for block, each in zip(self.layers, seen, strict=True)),
            *({"diagonal": total / count} for total in totals),
        ]
        for total, estimate in zip(self.estimates, estimates, strict=True):
            accumulate(total, estimate, share)
        if self._keeps:
            self.kept.append((share, seen))
        self.passes += share * len(slopes) * self._price(count if apart else 0)

    def _price(self, rows: int) -> float:
        """Return the backward passes of one score, with so many more of single examples."""
        if rows:
            return 0.5 * bool(self.layers) + rows
        others: list[Tensor] = [p for block in self.layers for p in block.params]
        alone = sum(p.numel() for p in self.alone)
        return 0.5 + 0.5 * alone / (alone + sum(p.numel() for p in others))
