"""The mean loss over a loader, as a function of chosen parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import caches, rng, vec
from ..batch import Batch, LossFunction
from ..examples import extent, to_device
from ..ranks import Ranks
from ..twice import Twice
from ..vec import Vec
from .data import Watch
from .params import Selection, chosen
from .still import Mode, still
from .together import agree, together

FORWARD = 1 / 3
"""Cost of a forward pass, in gradients."""


class Objective:
    """The loss ``L(w) = Σᵢ aᵢ ℓᵢ(w) / Σᵢ aᵢ`` over all examples of a loader, as a function of chosen parameters w.

    Args:
        model: the network, maybe inside ``torch.compile`` or ``DistributedDataParallel``.
        loss_fn: ``loss_fn(model, batch)`` returns the loss of each example, shape (B,), as in training; or their mean.
        loader: gives the same batches each time it is run through: a ``DataLoader`` that does not shuffle, or a list.
        params: the parameters w: None for all that require a gradient; a regular expression, which is searched in the
            names; a module; or the parameters themselves, frozen ones included.
        mode: ``"eval"``; or ``"train"``, in which normalisation layers use the batch (and hold their statistics) and
            every pass draws the same dropout masks.
        weights: ``weights(batch)`` returns the examples' weights aᵢ ≥ 0, shape (B,); None for 1.
        max_batches: batches to be used of the loader; None for all.
        autocast: dtype of mixed precision for the forward passes, or None.
        group: the ranks that hold a shard of the data each; None for this process alone, or for those of a
            ``DistributedDataParallel`` model. All of them have to take part in every measurement.

    Raises:
        ValueError: if no parameter is chosen, the weights are sharded or complex, or the loader shuffles or cannot be
            run through again.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        loader: Iterable[Any],
        *,
        params: Selection = None,
        mode: Mode = "eval",
        weights: Callable[[Any], Tensor] | None = None,
        max_batches: int | None = None,
        autocast: torch.dtype | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if mode not in ("eval", "train"):
            raise ValueError(f'mode={mode!r} must be "eval" or "train"')
        if max_batches is not None and max_batches < 1:
            raise ValueError(f"max_batches={max_batches!r} must be at least 1")
        ranks = Ranks(model)
        if ranks.sharded:
            raise ValueError("the weights are sharded over ranks, and their curvature cannot be measured: load the "
                             "full state_dict into a plain model")  # fmt: skip
        self.group = group if group is not None or ranks.ddp is None else ranks.ddp.process_group
        self.model = _unwrapped(model)
        self.loss_fn, self.loader, self.mode, self.weights = loss_fn, loader, mode, weights
        self.max_batches, self.autocast = max_batches, autocast
        self._choose(params)
        self._states = rng.states({p.device for p in self.model.parameters()})
        self._watch, self._spent, self._depth = Watch(loader), [0.0], [0]

    def only(self, params: Selection) -> Objective:
        """Return the same loss as a function of other parameters, with one count of the cost."""
        other = copy(self)
        other._choose(params)
        other._depth = [0]
        return other

    def _choose(self, params: Selection) -> None:
        self.names, self.params = chosen(self.model, params)
        self.size = sum(p.numel() for p in self.params)
        self.device = self.params[0].device
        self.dtype = torch.promote_types(widest(self.params), torch.float32)

    @contextmanager
    def still(self) -> Iterator[None]:
        """Hold the model still, see `steppe.curvature.still`; may be nested. Where one rank raises, all of them do."""
        with together(self.group, self.device):
            if self._depth[0]:
                yield
                return
            with still(self.model, self.params, self.mode):
                self._depth[0] += 1
                try:
                    yield
                finally:
                    self._depth[0] -= 1

    def batches(self) -> Iterator[Any]:
        """Give the batches, on the model's device; what is drawn from the global generators is the same each time.

        Raises:
            ValueError: if there is none, or they are not those of the run-through before.
        """
        rng.put_back(self._states)
        for batch in self._watch.through(islice(self.loader, self.max_batches)):
            yield to_device(batch, self.device)

    def losses(self, batch: Any, *, finite: bool = True, per_example: bool = False) -> Tensor:
        """Return the loss of each example, shape (B,), with its graph if gradients are enabled.

        Raises:
            ValueError: if one is not finite, unless ``finite`` is False.
        """
        size, _ = extent(batch)
        run = Batch(self.model, self.loss_fn, batch, autocast=self.autocast)
        run.per_example = per_example or self.weights is not None
        with Twice():  # a shorter double backward than torch's
            losses = run.losses_of(batch, size).expand(size)
        if finite and not losses.detach().isfinite().all():
            bad = losses.detach()[~losses.detach().isfinite()][0].item()
            raise ValueError(f"the loss is {bad} in batch {self._watch.index} of the loader: nothing can be measured "
                             "where the loss is not finite")  # fmt: skip
        return losses

    def weights_of(self, batch: Any, losses: Tensor) -> Tensor:
        """Return the weight of each example, shape (B,)."""
        if self.weights is None:
            return torch.ones_like(losses, requires_grad=False)
        weights = torch.as_tensor(self.weights(batch)).detach().to(losses)
        if weights.shape != losses.shape:
            raise ValueError(f"weights returned shape {tuple(weights.shape)} for losses of {tuple(losses.shape)}")
        if not ((weights >= 0) & weights.isfinite()).all():
            raise ValueError(f"weights of batch {self._watch.index} of the loader are negative or not finite")
        return weights

    def mean(self, total: Tensor, weight: Tensor) -> Tensor:
        """Return ``total`` over ``weight``, both summed over the ranks."""
        agree(self.group, self.device)
        if self.group is not None:
            total, weight = total.contiguous(), weight.clone()
            dist.all_reduce(total, group=self.group)
            dist.all_reduce(weight, group=self.group)
        if not weight > 0:
            raise ValueError("the weights of all examples are 0")
        return total / weight

    def loss(self, *, finite: bool = True) -> Tensor:
        """Return the mean loss, a float64 tensor of no dimensions.

        Raises:
            ValueError: if a loss is not finite, unless ``finite`` is False.

        Cost:
            1/3.
        """
        total = torch.zeros(2, dtype=exact(self.device), device=self.device)
        with self.still(), torch.no_grad():
            for batch in self.batches():
                losses = self.losses(batch, finite=finite)
                weights = self.weights_of(batch, losses)
                total += torch.stack([(weights * losses).to(total).sum(), weights.to(total).sum()])
                self.count(FORWARD, len(losses))
        return self.mean(total[0], total[1])

    def gradient(self) -> Tensor:
        """Return the gradient of the mean loss, shape (size,).

        Raises:
            ValueError: if a loss is not finite, or does not depend on the parameters.

        Cost:
            1.
        """
        total = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        weight = torch.zeros((), dtype=exact(self.device), device=self.device)
        with self.still(), torch.enable_grad():
            for batch in self.batches():
                losses = self.losses(batch)
                weights = self.weights_of(batch, losses)
                total += self.join(self.slopes((weights * losses).sum(), create_graph=False))
                weight += weights.to(weight).sum()
                self.count(1, len(losses))
        return self.mean(total, weight)

    def slopes(self, loss: Tensor, *, create_graph: bool) -> Vec:
        """Return the gradient of ``loss``, a tensor for each parameter; 0 for those that take no part.

        Raises:
            ValueError: if the loss depends on none of them.
        """
        if not loss.requires_grad:
            raise ValueError(
                f"the loss does not depend on {self._some()}: it was detached, or run under no_grad, or they are unused"
            )
        found = torch.autograd.grad(loss, self.params, create_graph=create_graph, materialize_grads=True)
        return list(found)

    @property
    def passes(self) -> float:
        """Cost so far, in gradients of the mean loss; a forward pass counts 1/3."""
        return self._spent[0] / self.examples if self._spent[0] else 0.0

    @property
    def examples(self) -> int:
        """Number of examples that this process holds; if not yet known, the loader is run through."""
        if not self._watch.complete:
            with self.still():
                for _ in self.batches():
                    pass
        return self._watch.examples

    @property
    def is_single(self) -> bool:
        """Whether it is known that there is one batch only."""
        try:
            return self.max_batches == 1 or len(self.loader) == 1  # type: ignore[arg-type]
        except TypeError:
            return False

    @property
    def rank(self) -> int:
        """Number of this process in the group."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def count(self, passes: float, examples: int) -> None:
        """Book ``passes`` gradients of so many examples."""
        self._spent[0] += passes * examples

    def join(self, u: Sequence[Tensor]) -> Tensor:
        """Return one flat vector of tensors shaped as the parameters."""
        return torch.cat([t.reshape(-1).to(self.device, self.dtype) for t in u])

    def split(self, flat: Tensor) -> Vec:
        """Return a flat vector as tensors shaped as the parameters."""
        if flat.shape != (self.size,):
            raise ValueError(f"a vector of shape {tuple(flat.shape)} for {self.size} entries of {self._some()}")
        pieces = torch.split(flat, [p.numel() for p in self.params])
        return [piece.view(p.shape).to(p.device, p.dtype) for piece, p in zip(pieces, self.params, strict=True)]

    @contextmanager
    def moved(self) -> Iterator[Callable[..., None]]:
        """Give ``move((a, u), (b, v), ...)``, which sets the parameters to ``w + a·u + b·v + ...``; back at the end.

        They are back to the bit, on an exception too. The vectors are flat, or lists of tensors.
        """
        start = vec.clone([p.detach() for p in self.params])

        def move(*terms: tuple[float, Tensor | Vec]) -> None:
            with torch.no_grad(), caches.forgotten():
                vec.copy_(self.params, start)
                for factor, direction in terms:
                    step = self.split(direction) if isinstance(direction, Tensor) else direction
                    vec.add_(self.params, step, factor)

        try:
            yield move
        finally:
            move()

    def generator(self, seed: int, purpose: str) -> torch.Generator:
        """Return a generator on the device of the flat vectors, a function of seed and purpose."""
        return rng.seeded(f"{seed} {purpose}", self.device)

    def _some(self) -> str:
        return self.names[0] if len(self.names) == 1 else f"the {len(self.names)} parameters {self.names[0]}, ..."


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else None
        inner = getattr(model, "_orig_mod", None) if inner is None else inner
        if inner is None:
            return model
        model = inner


def widest(params: Vec) -> torch.dtype:
    """Return the type of most bits among those of the parameters."""
    return max((p.dtype for p in params), key=lambda dtype: dtype.itemsize)


def exact(device: torch.device) -> torch.dtype:
    """Return the type in which long sums are taken on a device."""
    return torch.float32 if device.type == "mps" else torch.float64
