"""What every reference shares: gradients, moving the weights and back, norms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Data = tuple[Tensor, ...]
Losses = Callable[[nn.Module, Data], Tensor]
Tensors = list[Tensor]


class Reference:
    """A method on top of a base optimizer; `t` is the number of steps taken so far."""

    def __init__(self, model: nn.Module, base: torch.optim.Optimizer) -> None:
        self.model, self.base = model, base
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.t = 0

    def direction(self, losses: Losses, batch: Data, **draws: Any) -> Tensors:
        """What the base optimizer shall take for the gradient."""
        raise NotImplementedError

    def step(self, losses: Losses, batch: Data, **draws: Any) -> None:
        """One step of the base optimizer along the direction."""
        for p, d in zip(self.params, self.direction(losses, batch, **draws), strict=True):
            p.grad = d.clone()
        self.base.step()
        self.t += 1

    def gradient(self, losses: Losses, batch: Data) -> Tensors:
        """Gradient of the mean loss at w."""
        return gradient(losses(self.model, batch).mean(), self.params)

    def gradient_at(self, eps: Sequence[Tensor], losses: Losses, batch: Data) -> Tensors:
        """Gradient of the mean loss at w + eps; norm layers normalise by the batch but remember nothing."""
        with moved(self.params, eps), held(self.model):
            return gradient(losses(self.model, batch).mean(), self.params)


def gradient(loss: Tensor, params: Sequence[Tensor], create_graph: bool = False) -> Tensors:
    """Gradient of a scalar; zeros for parameters that took no part."""
    grads = torch.autograd.grad(loss, params, allow_unused=True, create_graph=create_graph)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]


@contextmanager
def moved(params: Sequence[Tensor], eps: Sequence[Tensor]) -> Iterator[None]:
    """The weights at w + eps; afterwards bitwise w again."""
    saved = [p.detach().clone() for p in params]
    try:
        with torch.no_grad():
            for p, e in zip(params, eps, strict=True):
                p.add_(e)
        yield
    finally:
        with torch.no_grad():
            for p, w in zip(params, saved, strict=True):
                p.copy_(w)


@contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """The model's buffers (BatchNorm's running statistics) afterwards bitwise as before."""
    saved = [b.clone() for b in model.buffers()]
    try:
        yield
    finally:
        for b, old in zip(model.buffers(), saved, strict=True):
            b.copy_(old)


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Inner product over all tensors together."""
    total = torch.zeros((), dtype=a[0].dtype)
    for x, y in zip(a, b, strict=True):
        total = total + (x * y).sum()
    return total


def norm(a: Sequence[Tensor]) -> Tensor:
    """2-norm over all tensors together."""
    return dot(a, a).sqrt()


def unit(a: Sequence[Tensor]) -> Tensors:
    """a / ||a||, and zeros for zeros."""
    n = norm(a)
    return [x / n if n > 0 else torch.zeros_like(x) for x in a]


def rejection(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensors:
    """The part of a that is orthogonal to b."""
    b_hat = unit(b)
    along = dot(a, b_hat)
    return [x - along * u for x, u in zip(a, b_hat, strict=True)]


def rows(batch: Data, index: slice | list[int]) -> Data:
    """Some examples of a batch."""
    return tuple(part[index] for part in batch)
