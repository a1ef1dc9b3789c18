"""What a part may ask of a batch beside its gradient: a Hessian product, squared gradients of single examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import once, rng, vec
from .batch import Batch
from .twice import Twice
from .vec import Vec


def with_products(
    batch: Batch,
    params: Vec,
    directions: Sequence[Vec],
    *,
    rows: Tensor | None = None,
    again: bool = False,
    weight: float = 1.0,
    scaler: torch.amp.GradScaler | None = None,
    beside: Sequence[Tensor] = (),
) -> tuple[Tensor, list[Tensor | None], list[Vec]]:
    """Return losses, gradient and Hessian products of the scaled mean loss: one graph, the math attention kernel.

    Args:
        batch: the examples.
        params: the tensors to differentiate by.
        directions: of the products, aligned with ``params``.
        rows: examples to take, shape (n,); None for all.
        again: whether this repeats a pass: statistics held, random numbers replayed.
        weight: factor of the loss.
        scaler: scales the loss.
        beside: tensors that get the gradient only, added to their ``.grad``.

    Returns:
        Losses of the examples taken, detached; the gradient, fresh tensors, None for those that take no part; the
        products, a list for each direction. They are the rank's own.

    Raises:
        ValueError: if the model is sharded, or the loss is not twice differentiable.

    Cost:
        A propagation, and 2 for each direction.
    """
    if batch.ranks.sharded:
        raise ValueError(
            "a sharded model has no Hessian-vector product: leave the second-order term, or the second-order base, out"
        )
    size, found = batch.size if rows is None else len(rows), []
    gradient: list[Tensor | None] = [None] * len(params)
    products = [[torch.zeros_like(p) for p in params] for _ in directions]
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(once.in_words())
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled graphs have no double backward
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        begin = stack.enter_context(batch.running(again, rows))
        stack.enter_context(batch.ranks.reducing(False))
        for i, (data, count) in enumerate(batch.chunks(rows)):
            begin(i)
            with Twice():
                losses = batch.losses_of(data, count).expand(count)
            once.refuse([losses])
            loss = losses.sum() * (weight / size)
            loss = loss if scaler is None else scaler.scale(loss)
            every = torch.autograd.grad(loss, [*params, *beside], create_graph=True, allow_unused=True)
            slopes = every[: len(params)]
            for p, slope in zip(beside, every[len(params) :], strict=True):
                if slope is not None:
                    p.grad = _plus(p.grad, slope.detach(), p)
            curved = [j for j, slope in enumerate(slopes) if slope is not None and slope.requires_grad]
            roots = [slopes[j] for j in curved]
            for number, (direction, product) in enumerate(zip(directions, products, strict=True)):
                if curved:
                    along, keep = [direction[j] for j in curved], number + 1 < len(directions)
                    further = torch.autograd.grad(roots, params, along, retain_graph=keep, materialize_grads=True)  # type: ignore[arg-type]
                    vec.add_(product, further)
            for j, (p, slope) in enumerate(zip(params, slopes, strict=True)):
                if slope is not None:
                    gradient[j] = _plus(gradient[j], slope.detach(), p)
            found.append(losses.detach())
            del losses, loss, every, slopes, roots
    return torch.cat(found), gradient, products


def _plus(total: Tensor | None, slope: Tensor, p: Tensor) -> Tensor:
    """Return the sum, laid out as the parameter and sharing memory with nothing."""
    return torch.empty_like(p).copy_(slope) if total is None else total.add_(slope)


def hessian_product(batch: Batch, params: Vec, direction: Vec, scaler: torch.amp.GradScaler | None = None) -> Vec:
    """Return the Hessian of the scaled mean loss times ``direction``; see ``with_products``.

    Cost:
        3 propagations.
    """
    return with_products(batch, params, [direction], again=True, scaler=scaler)[2][0]


def squared_gradients(batch: Batch, params: Vec, count: int) -> Vec:
    """Return ``Σᵢ (∇ℓᵢ)²`` over the first ``count`` examples, each run alone and in eval mode, in float32 at least.

    The examples are this rank's; of a sharded model, those of all ranks, one after the other.

    Cost:
        A propagation of each of the examples.
    """
    total = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params]
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
                    wide = [p.grad.to(t.dtype)]
                    vec.mul_(wide, wide)
                    vec.add_([t], wide)
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
