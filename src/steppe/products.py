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
        7/3 propagations.
    """
    if batch.ranks.sharded is not None:
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

    Raises:
        ValueError: if the model is sharded.

    Cost:
        A propagation of each of the examples.
    """
    if batch.ranks.sharded is not None:
        raise ValueError("a sharded model gives no gradients of single examples: use ssam_dynamic()")
    total = [torch.zeros_like(p) for p in params]
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # one graph more, for single examples
        stack.enter_context(rng.kept(batch.devices()))
        stack.enter_context(batch.running(True))
        stack.enter_context(_evaluating(batch.model))
        stack.enter_context(batch.ranks.reducing(False))
        for row in torch.arange(min(count, batch.size), device=batch.device):
            for data, _ in batch.chunks(row.reshape(1)):
                slopes = torch.autograd.grad(batch.losses_of(data, 1).sum(), params, materialize_grads=True)
                vec.mul_(slopes, slopes)
                vec.add_(total, slopes)
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
