"""Parameters of the model that another optimizer trains, or nobody."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .vec import Vec


class Others:
    """The trainable parameters of a model that the base does not hold.

    A backward pass gives them a gradient too. Of a step's passes the last one counts, as it does for parameters that
    are not perturbed; it is added to what was there, as by any ``backward``.

    Args:
        model: all parameters of the model.
        own: those that the base holds.
        copy: whether a gradient lies in memory that the next pass overwrites.
    """

    def __init__(self, model: Iterable[Tensor], own: Iterable[Tensor], *, copy: bool = False) -> None:
        held = set(own)
        self.params: Vec = [p for p in model if p.requires_grad and p not in held]
        self._before = [p.grad.clone() if copy and p.grad is not None else p.grad for p in self.params]

    def grads(self) -> Vec:
        """Return what the last pass has left."""
        found = [p.grad for p in self.params if p.grad is not None]
        return [g.coalesce().values() if g.layout == torch.sparse_coo else g for g in found]

    def clear(self) -> None:
        """Forget what a pass has left."""
        for p in self.params:
            p.grad = None

    def restore(self) -> None:
        """Leave the gradients that were there before the step, and hold them no longer."""
        for p, before in zip(self.params, self._before, strict=True):
            p.grad = before
        self.params, self._before = [], []

    def settle(self, scale: float) -> None:
        """Leave the last pass's gradients, without the loss's ``scale``, added to those that were there before."""
        for p, before in zip(self.params, self._before, strict=True):
            if p.grad is not None and scale != 1:
                p.grad.div_(scale)
            if before is not None:
                p.grad = before if p.grad is None else before.add_(p.grad)
        self.params, self._before = [], []
