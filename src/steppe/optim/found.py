"""Running averages of a Fisher matrix's factors, and their inversion."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .. import vec
from ..ranks import Job, Ranks
from .blocks import Block, Seen

State = dict[str, Tensor]


class Found:
    """What the sources of one step showed of each block: means over their examples, weighted by their shares."""

    def __init__(self) -> None:
        self.ranks = Ranks(None)
        self.sources = 0
        self._estimates: list[State] = []
        self._kept: list[tuple[float, list[Seen]]] = []

    def add(self, estimates: Sequence[State], kept: Sequence[tuple[float, list[Seen]]], share: float) -> None:
        """Add a source: an estimate of each block; and the raw pieces of each micro-batch, with its weight."""
        self._estimates = self._estimates or [{} for _ in estimates]
        for total, estimate in zip(self._estimates, estimates, strict=True):
            accumulate(total, estimate, share)
        self._kept += [(weight * share, seen) for weight, seen in kept]
        self.sources += 1

    def enter(
        self, blocks: Sequence[Block], states: list[State], dampings: Sequence[float], decay: float, inverts: bool
    ) -> None:
        """Bring the blocks' states up to date; the tensors in them are replaced, and none is overwritten.

        ``F ← decay·F + (1 − decay)·F_found``; what is found first, or in another shape, stands for itself. Inversions
        are shared out among the ranks. Second moments in an eigenbasis begin anew with the basis.

        Args:
            blocks: of all ranks the same.
            states: of the blocks, in their order.
            dampings: of the blocks.
            decay: weight of the past.
            inverts: whether all blocks are to be inverted, or those only that begin.

        Raises:
            ValueError: on all ranks, if a factor is singular or not finite.
        """
        if not self.sources:
            return
        self.ranks.mean_([t for estimate in self._estimates for t in estimate.values()])
        jobs: dict[int, Job] = {}
        for i, (block, state, estimate, damping) in enumerate(
            zip(blocks, states, self._estimates, dampings, strict=True)
        ):
            if not all(bool(t.isfinite().all()) for t in estimate.values()):
                raise ValueError(f"the Fisher matrix of {block.name} is not finite (damping={damping:g}): look for "
                                 "weights, inputs or outputs that are infinite or not a number")  # fmt: skip
            if _average(state, estimate, decay) or inverts:
                jobs[i] = block.price(), block.params[0].device, partial(_inverse, block, state, damping)
        for i, inverse in zip(jobs, self.ranks.share_out(list(jobs.values())), strict=True):
            states[i].update(inverse)
        if self._kept:
            self._rescale(blocks, states, decay, set(jobs))

    def _rescale(self, blocks: Sequence[Block], states: list[State], decay: float, anew: set[int]) -> None:
        """Average the second moments in the eigenbases, which some blocks have anew."""
        totals: list[State] = [{} for _ in self._kept[0][1]]
        for weight, seen in self._kept:
            for block, state, piece, total in zip(blocks, states, seen, totals, strict=False):
                accumulate(total, block.rescale(piece, state), weight)  # type: ignore[attr-defined]
        self.ranks.mean_([t for total in totals for t in total.values()])
        for i, (state, total) in enumerate(zip(states, totals, strict=False)):
            if i in anew:
                state.update(total)
            else:
                _average(state, total, decay)


def accumulate(total: State, estimate: State, weight: float) -> None:
    """Add ``weight`` times the estimate to the total, under the same names."""
    for name, value in estimate.items():
        if name in total:
            vec.add_([total[name]], [value], weight)
        else:
            total[name] = value * weight


def _average(state: State, estimate: State, decay: float) -> bool:
    """Average the estimate into the state, and return whether it begins with it."""
    begins = any(name not in state or state[name].shape != value.shape for name, value in estimate.items())
    for name, value in estimate.items():
        state[name] = value if begins else torch.lerp(value, state[name], decay)
    return begins


def _inverse(block: Block, state: State, damping: float) -> State:
    return {name: t.contiguous() for name, t in block.invert(state, damping).items()}
