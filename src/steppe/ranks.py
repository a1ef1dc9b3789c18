"""How the ranks of a model share its gradients: DDP, FSDP2, or one rank alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

Job: TypeAlias = tuple[float, torch.device, Callable[[], dict[str, Tensor]]]
"""A price, the device of the results, and what makes them."""


class Ranks:
    """The ranks that a model is trained on.

    Args:
        model: a network, maybe wrapped in ``DistributedDataParallel``, by ``fully_shard`` or by ``torch.compile``.

    Raises:
        ValueError: if several wrapped networks are inside the one, or it is sharded by FSDP1.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.ddp: Any = None
        self.sharded: list[Any] = []
        self.world, self.rank, self._group = 1, 0, None
        if model is None or not (dist.is_available() and dist.is_initialized()):
            return
        if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
            raise ValueError("FSDP1 flattens the parameters, so that ε would be that of a shard: use fully_shard")
        wrapped = [m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
        if len(wrapped) > 1:
            raise ValueError(f"{len(wrapped)} DistributedDataParallel networks in one model: wrap the whole once")
        self.ddp = wrapped[0] if wrapped else None
        self.sharded = [m for m in model.modules() if hasattr(m, "set_requires_gradient_sync")]
        if self.ddp is not None or self.sharded:
            self._group = self.ddp.process_group if self.ddp is not None else None
            self.world, self.rank = dist.get_world_size(self._group), dist.get_rank(self._group)

    @property
    def is_alone(self) -> bool:
        """Whether there is one process only."""
        return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)

    @property
    def shared_buffers(self) -> bool:
        """Whether a reduced gradient lies in memory that the next pass overwrites."""
        return self.ddp is not None and self.ddp.gradient_as_bucket_view

    def reducing(self, on: bool) -> AbstractContextManager[None]:
        """Let the passes inside reduce the gradients over the ranks as they go, or not at all."""
        return self._reducing(on) if self.ddp is not None or self.sharded else nullcontext()

    @contextmanager
    def _reducing(self, on: bool) -> Iterator[None]:
        if self.ddp is not None and not on:
            if self.ddp.static_graph and torch.is_grad_enabled():
                raise ValueError(
                    "DistributedDataParallel(static_graph=True) learns the graph from a pass that it reduces, and this "
                    "method, its ascent or its micro-batches leave passes unreduced: build it without static_graph"
                )
            with self.ddp.no_sync():
                yield
        elif self.sharded:
            self._set_sync(on)
            try:
                yield
            finally:
                self._set_sync(True)
        else:
            yield

    def check_by_hand(self) -> None:
        """Refuse what ranks without batches cannot follow: under ``join()`` they know of DDP's own reductions only.

        Raises:
            ValueError: under ``join()``.
        """
        if self.ddp is not None and self.ddp._join_config.enable:
            raise ValueError(
                "under join() the ranks without batches follow DDP's own reductions only, and this method or ascent "
                "needs others: give all ranks as many batches, or use a method without mask and selection, as sam()"
            )

    def _set_sync(self, on: bool) -> None:
        for module in self.sharded:
            module.set_requires_gradient_sync(on, recurse=False)

    def reshard(self) -> None:
        """Have a sharded model gather its weights anew: some stay gathered after a pass without backward."""
        for module in self.sharded:
            module.reshard()

    def forget(self) -> None:
        """Drop what a sharded model has accumulated and not reduced: the gradients of a pass that failed."""
        for module in self.sharded:
            group = getattr(module._get_fsdp_state(), "_fsdp_param_group", None)
            for each in getattr(group, "fsdp_params", ()):
                each.unsharded_accumulated_grad = None
                if hasattr(each, "_unsharded_param"):
                    each._unsharded_param.grad = None

    def frozen_but(self, params: Sequence[Tensor] | None) -> AbstractContextManager[None]:
        """Freeze the other parameters of a sharded model for a while, whose backward passes take no ``inputs``."""
        return nullcontext() if params is None or not self.sharded else self._frozen_but(set(params))

    @contextmanager
    def _frozen_but(self, kept: set[Tensor]) -> Iterator[None]:
        others = [p for p in self.sharded[0].parameters() if p.requires_grad and p not in kept]
        for p in others:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in others:
                p.requires_grad_(True)

    def most(self, count: int, device: torch.device) -> int:
        """Return the largest ``count`` of all ranks of a sharded model, which runs on all of them or on none."""
        if not self.sharded:
            return count
        counts = torch.tensor(count, device=device)
        dist.all_reduce(counts, dist.ReduceOp.MAX, group=self._group)
        return int(counts)

    def turns(self, count: int, device: torch.device) -> Iterator[tuple[int, int]]:
        """Give the rows of ``count`` examples one by one, each with its weight.

        The ranks of a sharded model run one example after the other together: its gradient is their mean, so the rank
        that has the example gives it the weight W, and the others run their first one with weight 0.
        """
        if not self.sharded:
            yield from ((row, 1) for row in range(count))
            return
        for rank, rows in enumerate(self._gather(torch.ones(count, device=device))):
            yield from ((row, self.world) if rank == self.rank else (0, 0) for row in range(len(rows)))

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the tensors by their mean over the ranks: one reduction for each type and device."""
        if self.world == 1:
            return
        self.check_by_hand()
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for t in tensors:
            kinds.setdefault((t.dtype, t.device), []).append(t)
        for same in kinds.values():
            flat = torch.cat([t.reshape(-1) for t in same])
            dist.all_reduce(flat, group=self._group)
            flat.div_(self.world)
            for t, piece in zip(same, torch.split(flat, [t.numel() for t in same]), strict=True):
                t.copy_(piece.view_as(t))

    def mean_gradients(self, params: Sequence[Tensor]) -> None:
        """Overwrite the gradients by their mean over the ranks; one that no rank has stays None."""
        if self.world == 1:
            return
        if self.ddp is not None and self.ddp.find_unused_parameters:
            self.check_by_hand()
            used = torch.tensor([float(p.grad is not None) for p in params], device=params[0].device)
            dist.all_reduce(used, group=self._group)
            for p, share in zip(params, used.tolist(), strict=True):
                if share and p.grad is None:
                    p.grad = torch.zeros_like(p)
        self.mean_([p.grad for p in params if p.grad is not None])

    def share_out(self, jobs: Sequence[Job]) -> list[dict[str, Tensor]]:
        """Run each job on one rank, those of the largest price first where least is to be done, and share the results.

        Args:
            jobs: the same on all ranks.

        Returns:
            What each of them returned, to the bit the same on all ranks.

        Raises:
            ValueError: on all ranks, if a job raised it on one.
        """
        if self.world == 1:
            return [run() for _, _, run in jobs]
        self.check_by_hand()
        loads, owners = [0.0] * self.world, [0] * len(jobs)
        for i in sorted(range(len(jobs)), key=lambda i: -jobs[i][0]):
            owners[i] = loads.index(min(loads))
            loads[owners[i]] += jobs[i][0]
        mine: dict[int, dict[str, Tensor]] = {}
        failure = None
        try:
            mine = {i: jobs[i][2]() for i, owner in enumerate(owners) if owner == self.rank}
        except ValueError as error:
            failure = str(error)
        shapes = {i: {name: (t.shape, t.dtype) for name, t in found.items()} for i, found in mine.items()}
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, (failure, shapes), group=self._group)
        for failure, _ in everyone:
            if failure is not None:
                raise ValueError(failure)
        results = []
        for i, owner in enumerate(owners):
            source = owner if self._group is None else dist.get_global_rank(self._group, owner)
            found = {}
            for name, (shape, dtype) in everyone[owner][1][i].items():
                found[name] = (
                    mine[i][name].contiguous() if i in mine else torch.empty(shape, dtype=dtype, device=jobs[i][1])
                )
                dist.broadcast(found[name], source, group=self._group)
            results.append(found)
        return results

    def choose(self, select: Callable[[Tensor], Tensor], rise: Tensor) -> tuple[Tensor, float]:
        """Select among the examples of all ranks.

        Returns:
            This rank's rows, and the factor of their mean loss with which the mean over the ranks is that over all
            selected examples. A rank without any takes its first row, with factor 0.
        """
        if self.world == 1:
            return select(rise), 1.0
        self.check_by_hand()
        everyone = self._gather(rise)
        rows = select(torch.cat(everyone))
        first = sum(len(each) for each in everyone[: self.rank])
        mine = rows[(rows >= first) & (rows < first + len(rise))] - first
        if not len(mine):
            return rows.new_zeros(1), 0.0
        return mine, self.world * len(mine) / len(rows)

    def _gather(self, values: Tensor) -> list[Tensor]:
        """Return every rank's ``values``, tensors of one dimension that may differ in length."""
        if self.world == 1:
            return [values]
        lengths = [torch.tensor(0, device=values.device) for _ in range(self.world)]
        dist.all_gather(lengths, torch.tensor(len(values), device=values.device), group=self._group)
        longest = max(int(n) for n in lengths)
        padded = torch.cat([values, values.new_zeros(longest - len(values))])
        everyone = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(everyone, padded, group=self._group)
        return [each[: int(n)] for each, n in zip(everyone, lengths, strict=True)]
