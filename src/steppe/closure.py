"""A bare PyTorch closure as the source of a step's gradients, and what is too little about it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from . import caches, norms, rng
from .ranks import Ranks
from .vec import Vec

BATCH = "write opt.step(steppe.Batch(model, loss_fn, batch))"
INTEGRATIONS = "steppe.integrations has what Lightning, transformers and Accelerate need"


class Closure:
    """A bare PyTorch closure: it can repeat itself, and nothing else.

    Args:
        closure: clears the gradients, computes the loss, calls ``backward`` and returns the loss.
        trainable: every tensor that the optimizer trains.
        repeats: whether the step may call it more than once; then a running statistic cannot be held, and is refused.
        eager: whether the first pass runs compiled networks eagerly: their layers are not seen otherwise.
    """

    size = 1

    def __init__(self, closure: Callable[[], Any], trainable: Vec, *, repeats: bool, eager: bool = False) -> None:
        self.closure, self.trainable, self.repeats = closure, trainable, repeats
        self.eager = eager and repeats and "torch._dynamo" in sys.modules
        self.ranks = Ranks(None)
        self._before: Any = None

    def backward(self, params: Vec | None, *, again: bool = False, **_: Any) -> Tensor:
        """Call the closure and return its loss, shape (1,); weight gradients outside ``params`` are not computed."""
        with torch.enable_grad(), ExitStack() as stack:
            if self.repeats:
                stack.callback(nn.modules.module.register_module_forward_pre_hook(_refuse_statistics).remove)
            if self.eager and not again:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if not again:
                self._before = rng.states({p.device for p in self.trainable})
            else:
                stack.enter_context(rng.replay(self._before))
            if params:
                wanted = {id(p) for p in params}
                for p in self.trainable:
                    if id(p) not in wanted:
                        stack.callback(p.requires_grad_, True)
                        p.requires_grad_(False)
            stack.enter_context(caches.forgotten())
            loss = self.closure()
        if loss is None:
            raise TypeError("the closure returned None: return the loss after calling backward on it")
        return torch.as_tensor(loss).detach().reshape(1)

    def names(self) -> dict[Tensor, str]:
        """Return no names: the model is hidden."""
        return {}


class Left:
    """What a step left in ``.grad``, to see whether somebody has accumulated other gradients since."""

    def __init__(self, params: Vec) -> None:
        self._kept = {p: (TensorWeakRef(p.grad), p.grad._version) for p in params if p.grad is not None}

    def is_changed(self, params: Vec) -> bool:
        """Whether there are gradients other than 0 that the step did not leave."""
        return any(p.grad is not None and not self._is_left(p, p.grad) and bool(p.grad.any()) for p in params)

    def _is_left(self, p: Tensor, grad: Tensor) -> bool:
        ref, version = self._kept.get(p, (None, 0))
        return ref is not None and ref() is grad and grad._version == version


def _refuse_statistics(module: nn.Module, _: Any) -> None:
    if module.training and norms.holding(module):
        raise TypeError(
            f"a bare closure cannot hold the statistics of {type(module).__name__} in the second pass: "
            f"{BATCH}; {INTEGRATIONS}"
        )
