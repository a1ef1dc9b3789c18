"""What a part may ask of a batch beside its gradient: a Hessian product, squared gradients of single examples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import rng, vec
from .batch import Batch
from .vec import Vec


def hessian_product(batch: Batch, params: Vec, direction: Vec, scaler: torch.amp.GradScaler | None = None) -> Vec:
    """Return the Hessian of the scaled mean loss times ``direction``: double backward, the math attention kernel.

    Raises:
        ValueError: if the model is sharded.

    Cost:
        3 propagations.
    """
    if batch.ranks.sharded:
        raise ValueError("a sharded model has no Hessian-vector product: leave the second-order term out")
    total = [torch.zeros_like(p) for p in params]
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled graphs have no double backward
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(batch.running(True))
        stack.enter_context(batch.ranks.reducing(False))
        for data, count in batch.chunks():
            loss = batch.losses_of(data, count).sum() / batch.size
            loss = loss if scaler is None else scaler.scale(loss)
            slopes = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
            along = torch.stack([(g * v).sum() for g, v in zip(slopes, direction, strict=True)]).sum()
            if along.requires_grad:
                vec.add_(total, torch.autograd.grad(along, params, materialize_grads=True))
    return total


def squared_gradients(batch: Batch, params: Vec, count: int) -> Vec:
    """Return ``Σᵢ (∇ℓᵢ)²`` over the first ``count`` examples, each run alone and in eval mode.

    The examples are this rank's; of a sharded model, those of all ranks, one after the other.

    Cost:
        A propagation of each of the examples.
    """
    total = [torch.zeros_like(p) for p in params]
    sharded = bool(batch.ranks.sharded)
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # one graph more, for single examples
        stack.enter_context(rng.kept(batch.devices()))
        stack.enter_context(batch.running(True))
        stack.enter_context(_evaluating(batch.model))
        stack.enter_context(batch.ranks.reducing(sharded))
        for row, weight in batch.ranks.turns(min(count, batch.size), batch.device):
            loss = weight * batch.losses_of(*batch.row(row)).sum()
            loss.backward(inputs=None if sharded else params)  # type: ignore[no-untyped-call]
            for p, t in zip(params, total, strict=True):
                if p.grad is not None:
                    vec.mul_([p.grad], [p.grad])
                    vec.add_([t], [p.grad])
                p.grad = None
    return total


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put the whole model into eval mode for a while."""
    modes: list[tuple[nn.Module, bool]] = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
