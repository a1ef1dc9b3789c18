"""What passes show of a network's layers, dense matrices of its blocks, and the exact Fisher matrix beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steppe.curvature.objective import Objective
from steppe.curvature.operator import Operator
from steppe.optim.blocks import Seen
from steppe.optim.layers import blocks, capture


def made(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A float64 network with its own seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().double()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def expected(z: Tensor, likelihood: str = "categorical") -> list[Tensor]:
    """Slopes of the log-likelihood by the outputs, the products of which add up to the expectation over labels."""
    if likelihood == "gaussian":
        return [e.view(z.shape[1:]).expand_as(z) for e in torch.eye(z[0].numel(), dtype=z.dtype)]
    p = z.detach().softmax(1)
    return [p[:, c : c + 1].sqrt() * (p - F.one_hot(torch.tensor(c), z.shape[1])) for c in range(z.shape[1])]


def look(
    model: nn.Module, x: Any, known: Sequence[Any], *, labels: Tensor | None = None, likelihood: str = "categorical"
) -> list[Seen]:
    """What each layer sees of the scores of all labels, or of the losses of the labels given."""
    with capture(known, len(x)) as seen:
        z = model(x)
    if labels is None:
        root, scores = z, expected(z, likelihood)
    else:
        root, scores = F.cross_entropy(z, labels, reduction="sum"), [torch.ones((), dtype=z.dtype)]
    edges = [edge for each in seen for edge in each.edges]
    for score in scores:
        found = iter(torch.autograd.grad(root, edges, score.to(root.dtype), retain_graph=True, allow_unused=True))
        for each in seen:
            each.gradients.append([next(found) for _ in each.edges])
    return seen


def estimated(model: nn.Module, x: Any, *, damping: float = 1e-2, **how: Any) -> list[tuple[Any, dict[str, Tensor]]]:
    """The blocks of a network with their state, inverted."""
    looking = {key: how.pop(key) for key in ("labels", "likelihood") if key in how}
    known, fallback = blocks(model, [p for p in model.parameters() if p.requires_grad], **how)
    assert not fallback, fallback
    found = []
    for block, seen in zip(known, look(model, x, known, **looking), strict=True):
        state = block.estimate(seen)
        state |= block.invert(state, damping)
        state |= block.rescale(seen, state)
        found.append((block, state))
    return found


def dense(block: Any, state: dict[str, Tensor]) -> Tensor:
    """The matrix of a block over its parameters one after the other, as half the second derivative of ``dᵀFd``."""
    sizes = [p.numel() for p in block.params]

    def quadratic(d: Tensor) -> Tensor:
        parts = d.split(sizes)
        return block.quadratic(state, [part.view(p.shape) for part, p in zip(parts, block.params, strict=True)]) / 2

    start = torch.zeros(sum(sizes), dtype=torch.float64)
    found: Tensor = torch.autograd.functional.hessian(quadratic, start)
    return found


def inverse(block: Any, state: dict[str, Tensor], damping: float) -> Tensor:
    """The damped inverse of a block, column by column."""
    sizes = [p.numel() for p in block.params]
    columns = []
    for e in torch.eye(sum(sizes), dtype=torch.float64):
        parts = [part.view(p.shape) for part, p in zip(e.split(sizes), block.params, strict=True)]
        columns.append(torch.cat([t.flatten() for t in block.solve(state, parts, damping)]))
    return torch.stack(columns, 1)


def fisher(model: nn.Module, x: Any, params: Sequence[Tensor], kind: str = "fisher", **how: Any) -> Tensor:
    """The exact Fisher matrix of the model's own labels, or the empirical one, over the parameters given."""
    labels = how.pop("labels", torch.zeros(len(x), dtype=torch.long))

    def losses(model: nn.Module, batch: Any) -> Tensor:
        z = model(batch[0])
        if how.get("likelihood") == "gaussian":
            return 0.5 * z.square().flatten(1).sum(1)
        return F.cross_entropy(z, batch[1], reduction="none")

    mode = "train" if model.training else "eval"
    matrix = Operator(Objective(model, losses, [(x, labels)], params=list(params), mode=mode), kind, **how)
    ordered = matrix.objective.params
    found = matrix @ torch.eye(matrix.size, dtype=torch.float64)
    starts, size = {}, 0
    for p in ordered:
        starts[p], size = size, size + p.numel()
    order = torch.cat([starts[p] + torch.arange(p.numel()) for p in params])
    return found[order][:, order]


def gap(found: Tensor, wanted: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((found - wanted).norm() / wanted.norm())
