"""One mini-batch's loss, forward and backward: the only file that sees a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase

from . import vec
from .vec import Vec

LossFunction = Callable[[Any, Any], Tensor]


class Batch:
    """One mini-batch: a model, a loss, the examples, and how to run them.

    ``L = (1/B) Σᵢ ℓᵢ``. The first pass over a batch moves the running statistics of normalisation layers; every further
    one normalises by the batch, leaves the statistics alone, and draws the same random numbers (dropout, stochastic
    depth) as the first.

    Args:
        model: the network, in the mode (train or eval) that the passes are to run in.
        loss_fn: ``loss_fn(model, data)`` returns the loss of each example, shape (B,).
        data: the examples: a tensor, or a tuple, list or mapping of tensors with the batch along dimension 0.
        micro: number of micro-batches that every pass is cut into, to save memory; default 1.
        autocast: dtype of mixed precision for the forward passes, or None.

    Raises:
        ValueError: if the batch is empty, or ``micro`` is smaller than 1 or larger than the batch.
        TypeError: from a step, if ``loss_fn`` does not return one loss for each example.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        data: Any,
        *,
        micro: int = 1,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model, self.loss_fn, self.data = model, loss_fn, data
        self.micro, self.autocast = micro, autocast
        self.size, self.device = _extent(data)
        if self.size == 0:
            raise ValueError("the batch is empty: a step needs at least one example")
        if not 1 <= micro <= self.size:
            raise ValueError(f"micro={micro!r} must lie between 1 and the batch's {self.size} examples")
        self._before: list[Tensor] | None = None
        self._hold = False

    def backward(self, params: Vec | None, *, rows: Tensor | None = None, again: bool = False) -> Tensor:
        """Add the gradient of the mean loss to ``.grad`` of ``params`` only, and return the losses.

        Args:
            params: the tensors to differentiate; None for every one that takes part. Weight gradients of the others are
                not computed.
            rows: examples to take, shape (n,); None for all.
            again: whether this repeats a pass: statistics held, random numbers replayed.

        Returns:
            Losses of the examples taken, detached, shape (B,) or (n,).
        """
        if params is not None and not params:
            return self.losses(again=again)
        data, size = (self.data, self.size) if rows is None else (_take(self.data, rows, self.size), len(rows))
        losses = []
        with torch.enable_grad(), self._pass(again):
            for part in self._chunks(data, size):
                each = self._losses(part)
                loss = each.mean() if len(each) == size else each.sum() / size
                loss.backward(inputs=params)  # type: ignore[no-untyped-call]
                losses.append(each.detach())
        return losses[0] if len(losses) == 1 else torch.cat(losses)

    def losses(self, *, again: bool = True) -> Tensor:
        """Return the losses of all examples without a gradient, shape (B,)."""
        with torch.no_grad(), self._pass(again):
            return torch.cat([self._losses(part) for part in self._chunks(self.data, self.size)])

    def product(self, params: Vec, direction: Vec) -> Vec:
        """Return the Hessian of the mean loss times ``direction``: double backward, the math attention kernel."""
        total = [torch.zeros_like(p) for p in params]
        with torch.enable_grad(), self._pass(True), sdpa_kernel(SDPBackend.MATH):
            for part in self._chunks(self.data, self.size):
                loss = self._losses(part).sum() / self.size
                slopes = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
                along = torch.stack([(g * v).sum() for g, v in zip(slopes, direction, strict=True)]).sum()
                if along.requires_grad:
                    vec.add_(total, torch.autograd.grad(along, params, materialize_grads=True))
        return total

    def squares(self, params: Vec, count: int) -> Vec:
        """Return ``Σᵢ (∇ℓᵢ)²`` over the first ``count`` examples, each run alone and in eval mode."""
        total = [torch.zeros_like(p) for p in params]
        with torch.enable_grad(), _kept_rng(self.device), self._pass(True), _evaluating(self.model):
            for i in range(min(count, self.size)):
                loss = self._losses(_take(self.data, slice(i, i + 1), self.size)).sum()
                slopes = torch.autograd.grad(loss, params, materialize_grads=True)
                vec.mul_(slopes, slopes)
                vec.add_(total, slopes)
        return total

    def groups(self, m: int) -> list[Batch]:
        """Return groups of ``m`` consecutive examples, the last one maybe smaller; only the first moves statistics."""
        if m >= self.size:
            return [self]
        groups = []
        for i in range(0, self.size, m):
            part = _take(self.data, slice(i, i + m), self.size)
            micro = min(self.micro, self.size - i, m)
            groups.append(Batch(self.model, self.loss_fn, part, micro=micro, autocast=self.autocast))
            groups[-1]._hold = i > 0
        return groups

    def names(self) -> dict[Tensor, str]:
        """Return the name of each parameter of the model."""
        return {p: name for name, p in self.model.named_parameters()}

    def _losses(self, data: Any) -> Tensor:
        if self.autocast is None:
            losses = self.loss_fn(self.model, data)
        else:
            with torch.autocast(self.device.type, self.autocast):
                losses = self.loss_fn(self.model, data)
        examples, _ = _extent(data)
        if not isinstance(losses, Tensor) or losses.shape != (examples,):
            what = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise TypeError(
                f"loss_fn returned {what} for {examples} examples: return one loss an example, shape (B,), "
                "as reduction='none' does"
            )
        return losses

    def _chunks(self, data: Any, size: int) -> Iterator[Any]:
        if self.micro == 1:
            yield data
            return
        step = -(-size // self.micro)
        for i in range(0, size, step):
            yield _take(data, slice(i, i + step), size)

    @contextmanager
    def _pass(self, again: bool) -> Iterator[None]:
        """Run a pass; ``again`` holds the statistics and replays the first pass's random numbers, if there was one."""
        with ExitStack() as stack:
            if again or self._hold:
                stack.enter_context(_held_statistics(self.model))
            if not again:
                self._before = _rng_states(self.device)
            elif self._before is not None:
                stack.enter_context(_kept_rng(self.device))
                _set_rng_states(self._before, self.device)
            torch.clear_autocast_cache()  # an outer autocast would go on with its casts of other weights
            yield


class Closure:
    """A bare PyTorch closure: it can repeat itself, and nothing else.

    Args:
        closure: clears the gradients, computes the loss, calls ``backward`` and returns the loss.
        trainable: every tensor that the optimizer trains.
        repeats: whether the step may call it more than once; then a running statistic cannot be held, and is refused.
    """

    size = 1

    def __init__(self, closure: Callable[[], Any], trainable: Vec, *, repeats: bool) -> None:
        self.closure, self.trainable, self.repeats = closure, trainable, repeats
        self._before: list[Tensor] = []

    def backward(self, params: Vec | None, *, rows: Tensor | None = None, again: bool = False) -> Tensor:
        """Call the closure and return its loss, shape (1,); weight gradients outside ``params`` are not computed."""
        with torch.enable_grad(), ExitStack() as stack:
            if self.repeats:
                stack.callback(nn.modules.module.register_module_forward_pre_hook(_refuse_statistics).remove)
            device = self.trainable[0].device
            if not again:
                self._before = _rng_states(device)
            else:
                stack.enter_context(_kept_rng(device))
                _set_rng_states(self._before, device)
            if params:
                wanted = {id(p) for p in params}
                for p in self.trainable:
                    if id(p) not in wanted:
                        stack.callback(p.requires_grad_, True)
                        p.requires_grad_(False)
            torch.clear_autocast_cache()
            loss = self.closure()
        if loss is None:
            raise TypeError("the closure returned None: return the loss after calling backward on it")
        return torch.as_tensor(loss).detach().reshape(1)


def _refuse_statistics(module: nn.Module, _: Any) -> None:
    if isinstance(module, _NormBase) and module.training and module.track_running_stats:
        raise TypeError(
            f"a bare closure cannot hold the running statistics of {type(module).__name__} in the second pass: "
            "write opt.step(steppe.Batch(model, loss_fn, batch))"
        )


@contextmanager
def _held_statistics(model: nn.Module) -> Iterator[None]:
    """Normalise by the batch and leave the running averages and their counter alone."""
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put the whole model into eval mode for a while."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _extent(data: Any) -> tuple[int, torch.device]:
    """Return the number of examples, and their device, from the first tensor that has a dimension."""
    for leaf in _leaves(data):
        if leaf.ndim:
            return len(leaf), leaf.device
    raise TypeError(f"data of type {type(data).__name__} holds no tensor with a batch dimension")


def _leaves(data: Any) -> Iterator[Tensor]:
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, Mapping):
        for value in data.values():
            yield from _leaves(value)
    elif isinstance(data, Sequence) and not isinstance(data, str):
        for value in data:
            yield from _leaves(value)


def _take(data: Any, rows: Tensor | slice, size: int) -> Any:
    """Return the rows of every tensor that has ``size`` of them; everything else as it is."""
    if isinstance(data, Tensor):
        return data[rows] if data.ndim and len(data) == size else data
    if isinstance(data, Mapping):
        return {key: _take(value, rows, size) for key, value in data.items()}
    if isinstance(data, Sequence) and not isinstance(data, str):
        parts = [_take(value, rows, size) for value in data]
        return type(data)(*parts) if hasattr(data, "_fields") else type(data)(parts)  # type: ignore[call-arg]
    return data


@contextmanager
def _kept_rng(device: torch.device) -> Iterator[None]:
    """Leave the global generators as they were found."""
    states = _rng_states(device)
    try:
        yield
    finally:
        _set_rng_states(states, device)


def _rng_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _set_rng_states(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1], device)
