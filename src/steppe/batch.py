"""One mini-batch's loss, forward and backward: the only file that runs a model."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from . import caches, norms, rng
from .examples import extent, take, to_float32
from .ranks import Ranks
from .rounding import widened
from .vec import Vec

LossFunction = Callable[[Any, Any], Tensor]


class Batch:
    """One mini-batch: a model, a loss, the examples, and how to run them.

    ``L = (1/B) Σᵢ ℓᵢ``. The first pass over a batch moves the running statistics of normalisation layers, once,
    whatever it is cut into; every further one normalises by the batch, leaves the statistics alone, and draws the same
    random numbers (dropout, stochastic depth) as the first. In a pass over selected examples (ESAM) they fall on other
    examples than in the first.

    Args:
        model: the network, in the mode (train or eval) that the passes are to run in; maybe wrapped in
            ``DistributedDataParallel``, by ``fully_shard`` or by ``torch.compile``.
        loss_fn: ``loss_fn(model, data)`` returns the loss of each example, shape (B,); or their mean, shape (), for
            methods that look at no single examples.
        data: the examples: a tensor, or a tuple, list or mapping of tensors with the batch along dimension 0. Arrays
            and lists beside them (strings, say) are cut into rows with them where they are as long.
        micro: number of micro-batches that every pass is cut into, to save memory; default 1.
        autocast: dtype of mixed precision for the forward passes, or None.
        replay: whether every pass draws the random numbers of the first; False to draw them anew. Default True.
        hold: ``hold(model)`` is a context manager that holds the statistics of normalisation layers that torch does
            not know; default None.

    Raises:
        ValueError: if the batch is empty, or ``micro`` is smaller than 1 or larger than the batch.
        TypeError: if ``data`` holds no tensor; from a step, if ``loss_fn`` does not return one loss for each example
            where that is needed.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        data: Any,
        *,
        micro: int = 1,
        autocast: torch.dtype | None = None,
        replay: bool = True,
        hold: norms.Hold | None = None,
    ) -> None:
        self.model, self.loss_fn = model, loss_fn
        self.autocast, self.replay, self.hold = autocast, replay, hold
        self.size, self.device = extent(data)
        if self.size == 0:
            raise ValueError("the batch is empty: a step needs at least one example")
        if not isinstance(micro, (int, numbers.Integral)) or not 1 <= micro <= self.size:
            raise ValueError(f"micro={micro!r} must be a whole number between 1 and the batch's {self.size} examples")
        self._micro = micro
        self._parts: list[tuple[Any, int]] = [(data, self.size)]
        self._before: Any = None
        self._still = self._wide = False
        self.per_example = False
        """Whether the method looks at the losses of single examples."""
        self.ranks = Ranks(model)

    @classmethod
    def from_micro_batches(cls, model: nn.Module, loss_fn: LossFunction, batches: Sequence[Any], **how: Any) -> Batch:
        """Return the batch that several micro-batches, maybe of unequal sizes, make together: gradient accumulation.

        ``L = (1/B) Σ_j Σ_{i in j} ℓᵢ``, as if the examples stood in one batch.

        Args:
            model: as in ``Batch``.
            loss_fn: as in ``Batch``; it sees one micro-batch at a time.
            batches: the micro-batches.
            how: ``autocast``, ``replay`` and ``hold``, as in ``Batch``.

        Raises:
            ValueError: if there is no micro-batch, or one is empty.
        """
        return cls.join([cls(model, loss_fn, data, **how) for data in batches])

    @classmethod
    def join(cls, batches: Sequence[Batch]) -> Batch:
        """Return the one batch that several make together, run as the first of them.

        Raises:
            ValueError: if there is none, or they differ in model or loss.
        """
        if not batches:
            raise ValueError("no micro-batches: a step needs at least one example")
        first = batches[0]
        if any(each.model is not first.model or each.loss_fn != first.loss_fn for each in batches):
            raise ValueError(
                "the micro-batches of one step differ in model or loss_fn: define both outside of the loop"
            )
        parts = [part for each in batches for part in each.chunks()]
        whole = cls(
            first.model, first.loss_fn, parts[0][0], autocast=first.autocast, replay=first.replay, hold=first.hold
        )
        whole._parts, whole.size = parts, sum(size for _, size in parts)
        return whole

    def backward(
        self,
        params: Vec | None,
        *,
        rows: Tensor | None = None,
        again: bool = False,
        reduce: bool = True,
        weight: float = 1.0,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor:
        """Add the gradient of ``weight`` times the mean loss to ``.grad`` of ``params`` only, and return the losses.

        Args:
            params: the tensors to differentiate; None for every one that takes part. Weight gradients of the others are
                not computed.
            rows: examples to take, shape (n,); None for all.
            again: whether this repeats a pass: statistics held, random numbers replayed.
            reduce: whether the gradients are averaged over the ranks; those of a part of the parameters never are.
            weight: factor of the loss.
            scaler: scales the loss.

        Returns:
            Losses of the examples taken, detached, shape (B,) or (n,); or their mean, shape (), where ``loss_fn`` gave
            that and they ran in one piece.
        """
        if params is not None and not params:
            return self.losses(again=again)
        size, losses = self.size if rows is None else len(rows), []
        inputs = None if self.ranks.sharded else params
        reduce = reduce and inputs is None
        with torch.enable_grad(), self.running(again, rows) as begin, self.ranks.frozen_but(params):
            parts = list(self.chunks(rows))
            self._keep_up(len(parts))
            for i, (data, count) in enumerate(parts):
                begin(i)
                with self.ranks.reducing(reduce and i == len(parts) - 1):
                    each = self.losses_of(data, count)
                    slope = torch.full_like(each, weight * (1 if each.ndim else count) / size)
                    slope = slope if scaler is None else scaler.scale(slope)
                    each.backward(slope, inputs=inputs)  # type: ignore[no-untyped-call]
                losses.append(each.detach())
        if len(losses) == 1:
            return losses[0]
        return torch.cat([each.expand(count) for each, (_, count) in zip(losses, parts, strict=True)])

    def follow(self, first: Batch) -> None:
        """Let further passes draw the random numbers of the first pass over another batch."""
        self._before = first._before

    def losses(self, *, again: bool = True) -> Tensor:
        """Return the losses of all examples without a gradient, shape (B,)."""
        with torch.no_grad(), self.running(again) as begin, self.ranks.reducing(False):
            found, parts = [], list(self.chunks())
            self._keep_up(len(parts))
            for i, (data, count) in enumerate(parts):
                begin(i)
                found.append(self.losses_of(data, count).expand(count))
            return torch.cat(found)

    def groups(self, m: int) -> list[Batch]:
        """Return groups of ``m`` consecutive examples, the last one maybe smaller; only the first moves statistics."""
        if m >= self.size:
            return [self]
        groups = []
        for i in range(0, self.size, m):
            rows = torch.arange(i, min(i + m, self.size), device=self.device)
            group = type(self).__new__(type(self))
            group.__dict__.update(self.__dict__)
            group._parts = list(self._cut(rows))
            group.size = len(rows)
            group._micro = min(self._micro, group.size) if len(group._parts) == 1 else 1
            group._still = i > 0
            groups.append(group)
        return groups

    def names(self) -> dict[Tensor, str]:
        """Return the name of each parameter of the model."""
        return {p: name for name, p in self.model.named_parameters()}

    @contextmanager
    def widened(self) -> Iterator[None]:
        """Hold the model's bf16 and fp16 tensors in float32, and run the passes in float32 without autocast."""
        if self.ranks.ddp is not None or self.ranks.sharded:
            raise ValueError('rounding="float32" changes the type of the weights, which DDP and FSDP hold on to')
        self._wide = True
        try:
            with widened(self.model.parameters(), self.model.buffers()):
                yield
        finally:
            self._wide = False

    def losses_of(self, data: Any, count: int) -> Tensor:
        """Return the losses of one micro-batch of so many examples, shape (count,), or their mean, shape ()."""
        precision: AbstractContextManager[Any] = nullcontext()
        if self._wide:
            data, precision = to_float32(data), torch.autocast(self._home().type, enabled=False)
        elif self.autocast is not None:
            precision = torch.autocast(self._home().type, self.autocast)
        with precision:
            losses = self.loss_fn(self.model, data)
        if isinstance(losses, Tensor) and losses.ndim == 0:
            if self.per_example and count > 1:
                raise TypeError(
                    "loss_fn returned a mean, but the method looks at the loss of each example: return shape (B,), "
                    "as reduction='none' does"
                )
            return losses
        if not isinstance(losses, Tensor) or losses.shape != (count,):
            what = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise TypeError(
                f"loss_fn returned {what} for {count} examples: return one loss an example, shape (B,), "
                "as reduction='none' does, or their mean"
            )
        return losses

    def _home(self) -> torch.device:
        """Return where the model runs, whatever device its data are handed over on."""
        return next((p.device for p in self.model.parameters()), self.device)

    def _keep_up(self, count: int) -> None:
        """Run the micro-batches that other ranks of a sharded model have more, with weight 0."""
        for _ in range(self.ranks.most(count, self.device) - count):
            with norms.held(self.model, self.hold), self.ranks.reducing(False):
                loss = 0 * self.losses_of(*self.row(0)).sum()
                if torch.is_grad_enabled():
                    loss.backward()  # type: ignore[no-untyped-call]

    def row(self, i: int) -> tuple[Any, int]:
        """Return a micro-batch of the one example."""
        return next(self._cut(torch.tensor([i], device=self.device)))

    def chunks(self, rows: Tensor | None = None) -> Iterator[tuple[Any, int]]:
        """Give the micro-batches of a pass with their sizes."""
        for data, size in self._parts if rows is None else self._cut(rows):
            step = -(-size // self._micro)
            if step == size:
                yield data, size
                continue
            for i in range(0, size, step):
                yield take(data, slice(i, i + step), size), min(step, size - i)

    def _cut(self, rows: Tensor) -> Iterator[tuple[Any, int]]:
        """Give the rows that each of the parts holds."""
        if len(self._parts) == 1:
            data, size = self._parts[0]
            yield take(data, rows, size), len(rows)
            return
        first = 0
        for data, size in self._parts:
            here = rows[(rows >= first) & (rows < first + size)] - first
            if len(here):
                yield take(data, here, size), len(here)
            first += size

    @contextmanager
    def running(self, again: bool, rows: Tensor | None = None) -> Iterator[Callable[[int], None]]:
        """Run a pass; ``again`` holds the statistics and replays the first pass's random numbers, if there was one."""
        if not again:
            self._before = rng.states(self.devices())
        replayed = again and self.replay and self._before is not None
        with (
            self._statistics(again, rows) as begin,
            rng.replay(self._before) if replayed else nullcontext(),
            caches.forgotten(),
        ):
            self.ranks.reshard()
            yield begin or _nothing

    def _statistics(self, again: bool, rows: Tensor | None) -> AbstractContextManager[Callable[[int], None] | None]:
        """Return what holds the statistics, or moves them once; in one piece torch moves them as ever."""
        if again or self._still:
            return norms.held(self.model, self.hold)
        if len(self._parts) > 1 or self._micro > 1:
            return norms.pooled(self.model, [n for _, n in self.chunks(rows)], self.hold)
        return nullcontext()

    def devices(self) -> set[torch.device]:
        """Return the devices of the data and of the parameters."""
        if not torch.accelerator.is_available():
            return {self.device}
        return {self.device, *(p.device for p in self.model.parameters())}


def _nothing(_: int) -> None:
    """Begin a micro-batch whose statistics need nothing."""
