"""Dense matrices of curvature, built plainly, and small float64 networks with data to hold the operators against."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steppe.curvature.objective import Objective
from steppe.curvature.operator import Operator

Batches = list[tuple[Tensor, Tensor]]


def losses(model: nn.Module, batch: Any) -> Tensor:
    """Cross entropy of each example, shape (B,)."""
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")


def squares(model: nn.Module, batch: Any) -> Tensor:
    """Half the squared error of each example, shape (B,)."""
    x, y = batch
    return 0.5 * (model(x) - y).square().flatten(1).sum(1)


def made(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A float64 network with its own seed, in train mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().double()


def mlp() -> nn.Module:
    """11 - 15 - 14 - 4 with tanh: 464 weights."""
    return made(lambda: nn.Sequential(nn.Linear(11, 15), nn.Tanh(), nn.Linear(15, 14), nn.Tanh(), nn.Linear(14, 4)))


def small(seed: int = 0) -> nn.Module:
    """4 - 5 - 3 with tanh: 43 weights."""
    return made(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), seed)


def uneven(*shape: int, classes: int = 3, sizes: Sequence[int] = (4, 3, 1), seed: int = 1) -> Batches:
    """Batches of unequal sizes: standard normal inputs, random labels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return [(torch.randn(n, *shape, dtype=torch.float64), torch.randint(classes, (n,))) for n in sizes]


def examples(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Every example as a batch of one."""
    for x, y in batches:
        for i in range(len(x)):
            yield x[i : i + 1], y[i : i + 1]


def dense(A: Any) -> Tensor:
    """All columns of an operator."""
    return A @ torch.eye(A.size, dtype=A.dtype, device=A.device)


def probes(size: int, count: int = 3) -> Tensor:
    """Standard normal vectors as columns."""
    return torch.randn(size, count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def operator(model: nn.Module, loss_fn: Any, loader: Any, kind: str = "hessian", **kwargs: Any) -> Operator:
    """An operator, with the arguments of its objective."""
    mine = {key: kwargs.pop(key) for key in ("draws", "likelihood", "seed", "reuse") if key in kwargs}
    return Operator(Objective(model, loss_fn, loader, **kwargs), kind, **mine)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def rows(outputs: Tensor, params: Sequence[Tensor]) -> Tensor:
    """The Jacobian of a flat tensor, a row for each entry, by as many backward passes."""
    return torch.stack(
        [flat(torch.autograd.grad(each, params, retain_graph=True, materialize_grads=True)) for each in outputs]
    )


def hessian(loss: Tensor, params: Sequence[Tensor]) -> Tensor:
    """The second derivative of a number, by double backward, row by row."""
    return rows(flat(torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)), params)


def gauss_newton(model: nn.Module, batches: Batches, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Mean over the examples of ``JᵀHJ``, with H the second derivative of one example's loss by its outputs."""
    found = []
    for x, y in examples(batches):
        z = model(x)[0]
        J, leaf = rows(z, list(model.parameters())), z.detach().requires_grad_()
        found.append(J.T @ hessian(loss(leaf, y[0]), [leaf]) @ J)
    return torch.stack(found).mean(0)


def outer(model: nn.Module, loss_fn: Any, batches: Batches) -> Tensor:
    """Mean over the examples of ``∇ℓ ∇ℓᵀ``."""
    params = list(model.parameters())
    G = torch.stack([flat(torch.autograd.grad(loss_fn(model, one)[0], params)) for one in examples(batches)])
    return G.T @ G / len(G)


def differences(model: nn.Module, loss_fn: Any, batches: Any, V: Tensor, mode: str = "eval") -> Tensor:
    """The Hessian of the mean loss times the columns of V, by central differences of plain gradients of a copy."""
    model = copy.deepcopy(model).train(mode == "train")
    start = flat([p.detach() for p in model.parameters()])
    found = []
    for v in V.T:
        step = 1e-5 / v.norm()
        ends = [gradient(model, loss_fn, batches, start + sign * step * v) for sign in (1, -1)]
        found.append((ends[0] - ends[1]) / (2 * step))
    return torch.stack(found, 1)


def gradient(model: nn.Module, loss_fn: Any, batches: Any, weights: Tensor) -> Tensor:
    """The gradient of the mean loss at other weights, plainly."""
    torch.nn.utils.vector_to_parameters(weights, model.parameters())
    each = torch.cat([loss_fn(model, batch) for batch in batches])
    return flat(torch.autograd.grad(each.mean(), list(model.parameters()), materialize_grads=True))


def gap(found: Tensor, wanted: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((found - wanted).norm() / wanted.norm())


def state(model: nn.Module) -> dict[str, Any]:
    """All that a measurement must leave alone, weights and buffers to the bit."""
    params = dict(model.named_parameters())
    return {
        "modes": [module.training for module in model.modules()],
        "tracking": [getattr(module, "track_running_stats", None) for module in model.modules()],
        "weights": {name: p.detach().clone() for name, p in params.items()},
        "where": {name: (id(p), p.data_ptr()) for name, p in params.items()},
        "buffers": {name: (id(buffer), buffer.clone()) for name, buffer in model.named_buffers()},
        "required": {name: p.requires_grad for name, p in params.items()},
        "gradients": {name: None if p.grad is None else (id(p.grad), p.grad.clone()) for name, p in params.items()},
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "random": torch.get_rng_state(),
    }


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal to the bit."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Fail if the block leaves a trace in the model or in the global generators, on an exception too."""
    before = state(model)
    try:
        yield
    finally:
        after = state(model)
        assert not [key for key in before if not same(before[key], after[key])]


def refused(run: Callable[[], Any], *words: str, error: type[Exception] = ValueError) -> None:
    """Fail unless an error is raised whose message is one line and has all the words."""
    with pytest.raises(error) as caught:
        run()
    assert type(caught.value) is error
    text = str(caught.value)
    assert "\n" not in text
    assert not [word for word in words if word not in text], text
