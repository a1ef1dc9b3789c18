"""Products of one batch's curvature matrix with vectors, by double backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import once
from ..vec import Vec
from .objective import Objective

Product: TypeAlias = Callable[[Vec, bool], Vec]
"""``product(v, keep)``: the matrix times v; ``keep`` says whether the graph is needed again."""
Likelihood: TypeAlias = Literal["categorical", "gaussian"]


def hessian(objective: Objective, batch: Any) -> tuple[Product, Tensor, int]:
    """Prepare products with the Hessian of ``Σᵢ aᵢ ℓᵢ``; return them, the weights aᵢ, and the number of examples.

    Cost:
        1 gradient, and 2 for each product.
    """
    losses = objective.losses(batch)
    once.refuse([losses])
    weights = objective.weights_of(batch, losses)
    slopes = objective.slopes((weights * losses).sum(), create_graph=True)
    curved = [i for i, slope in enumerate(slopes) if slope.requires_grad]

    def product(v: Vec, keep: bool) -> Vec:
        if not curved:
            return [torch.zeros_like(p) for p in objective.params]
        roots, along = [slopes[i] for i in curved], [v[i] for i in curved]
        return _grad(roots, objective.params, along, retain_graph=keep)

    return product, weights, len(losses)


def gauss_newton(objective: Objective, batch: Any) -> tuple[Product, Tensor, int]:
    """Prepare products with ``Σᵢ aᵢ Jᵢᵀ (∇²ℓᵢ) Jᵢ``, ∇² over the model's outputs and J their Jacobian.

    Cost:
        1 gradient, and 4/3 for each product.
    """
    outputs, leaves, losses = cut(objective, batch)
    once.refuse([losses])
    beside = torch.autograd.grad(losses.sum(), objective.params, retain_graph=True, allow_unused=True)
    if any(slope is not None for slope in beside):
        raise ValueError("the loss depends on the parameters not only through the model's outputs, and the "
                         "Gauss-Newton matrix would miss that part: take penalties out of loss_fn, or "
                         'kind="hessian"')  # fmt: skip
    weights = objective.weights_of(batch, losses)
    slopes = torch.autograd.grad((weights * losses).sum(), leaves, create_graph=True, allow_unused=True)
    curved = [i for i, slope in enumerate(slopes) if slope is not None and slope.requires_grad]
    if not curved:
        raise ValueError(
            "the loss is linear in the model's outputs, so its Gauss-Newton matrix is 0: if the model computes its "
            "loss itself, have loss_fn compute it of the logits"
        )

    def middle(u: Vec) -> Vec:
        return _grad([slopes[i] for i in curved], leaves, [u[i] for i in curved], retain_graph=True)

    return _sandwich(objective, outputs, middle), weights, len(losses)


def fisher(
    objective: Objective, batch: Any, likelihood: Likelihood | None, draws: int, generator: torch.Generator
) -> tuple[Product, Tensor, int]:
    """Prepare products with ``Σᵢ aᵢ Jᵢᵀ E[s sᵀ] Jᵢ``, s the slope of ``−log p(y | outputs)`` with y from the model.

    Args:
        objective: the mean loss; its labels take no part.
        batch: the examples.
        likelihood: ``"categorical"``: the outputs are logits, shape (B, C), and ``E[s sᵀ] = diag(p) − p pᵀ``;
            ``"gaussian"``: they are means at variance 1, shape (B, ...), and ``E[s sᵀ] = 1``;
            None: categorical, and refused where the loss itself says otherwise.
        draws: labels drawn for each example; 0 for the exact expectation.
        generator: draws the labels.

    Cost:
        1 gradient, and 4/3 for each product.
    """
    outputs, leaves, losses = cut(objective, batch)
    weights = objective.weights_of(batch, losses)
    assumed, likelihood = likelihood is None, likelihood or "categorical"
    used = torch.autograd.grad(losses.sum(), leaves, create_graph=assumed, allow_unused=True)
    kept, curves = [], []
    for z, leaf, slope in zip(outputs, leaves, used, strict=True):
        if slope is not None:
            kept.append(z)
            curves.append((leaf, slope))
    if len(kept) != 1 or kept[0].shape[:1] != losses.shape or (likelihood == "categorical" and kept[0].ndim != 2):
        shapes = ", ".join(str(tuple(z.shape)) for z in kept)
        wanted = "logits (B, C)" if likelihood == "categorical" else "means (B, ...)"
        raise ValueError(f"the Fisher matrix needs one output, {wanted} for {len(losses)} examples; the loss uses "
                         f'{shapes or "none"}: take kind="ggn", the same for cross-entropy')  # fmt: skip
    if assumed:
        _refuse_regression(*curves[0])
    z = kept[0].detach()
    spread = weights.reshape(-1, *[1] * (z.ndim - 1)).to(z)
    if draws:
        scores = torch.stack([score(z, likelihood, generator) for _ in range(draws)])
        axes = tuple(range(2, scores.ndim))

        def middle(u: Vec) -> Vec:
            along = (scores * u[0]).sum(axes, keepdim=True) if axes else scores * u[0]
            return [spread * (scores * along).mean(0)]

    elif likelihood == "categorical":
        p = z.softmax(1)

        def middle(u: Vec) -> Vec:
            return [spread * p * (u[0] - (p * u[0]).sum(1, keepdim=True))]

    else:

        def middle(u: Vec) -> Vec:
            return [spread * u[0]]

    return _sandwich(objective, kept, middle), weights, len(losses)


def _refuse_regression(logits: Tensor, slope: Tensor) -> None:
    """Raise unless the losses curve over the logits like a cross-entropy: ``c (diag(p) − p pᵀ)``, whatever the label.

    c ≥ 0 is the weight of an example or of its class. A tenth of the curvature may be of another kind, as that of a
    small penalty. A loss that is linear in the outputs, as in log-probabilities, or has no second derivative, says
    nothing.
    """
    if not slope.requires_grad:
        return
    u = 1 + torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))  # nothing curves along 1
    dtype = torch.promote_types(logits.dtype, torch.float32)
    try:
        found = _grad([slope], [logits], [u.to(logits)], retain_graph=True)[0].to(dtype)
    except RuntimeError:
        return
    u, p = u.to(found), logits.detach().to(dtype).softmax(1)
    expected = p * (u - (p * u).sum(1, keepdim=True))
    squares = expected.square().sum(1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
    weights = ((found * expected).sum(1, keepdim=True) / squares).clamp_min(0)
    rounding = 100 * torch.finfo(logits.dtype).eps * u.norm()
    if (found - weights * expected).norm() > 0.1 * (found.norm() + rounding):
        raise ValueError("the loss is not the cross-entropy of the model's outputs, and the Fisher matrix would not be "
                         'that of its likelihood: give likelihood="gaussian" for a regression, "categorical" if the '
                         'outputs are logits all the same, or kind="ggn"')  # fmt: skip


def score(outputs: Tensor, likelihood: Likelihood, generator: torch.Generator) -> Tensor:
    """Return the slope of ``−log p(y | outputs)`` with y drawn from the model, shaped as the outputs."""
    if likelihood == "gaussian":
        return torch.randn(outputs.shape, dtype=outputs.dtype, device=outputs.device, generator=generator)
    p = outputs.softmax(1)
    labels = torch.multinomial(p, 1, generator=generator)
    return p.scatter_add(1, labels, torch.full_like(p[:, :1], -1.0))


def empirical(objective: Objective, batch: Any) -> tuple[Product, Tensor, int]:
    """Prepare products with ``Σᵢ aᵢ ∇ℓᵢ ∇ℓᵢᵀ``.

    Cost:
        1 gradient, and 4/3 for each product.
    """
    losses = objective.losses(batch, per_example=True)
    if not losses.requires_grad:
        raise ValueError("the loss does not depend on the chosen parameters: it was detached, or run under no_grad")
    weights = objective.weights_of(batch, losses)

    def middle(u: Vec) -> Vec:
        return [weights * u[0]]

    return _sandwich(objective, [losses], middle), weights, len(losses)


def cut(objective: Objective, batch: Any) -> tuple[Vec, Vec, Tensor]:
    """Return the model's outputs with their graph, leaves of the same values, and the losses made of these leaves.

    Raises:
        ValueError: unless ``loss_fn`` calls the model once.
    """
    calls: list[tuple[Vec, Vec]] = []

    def replace(module: nn.Module, inputs: Any, output: Any) -> Any:
        parts, structure = pytree.tree_flatten(output)
        outputs, leaves = [], []
        for i, part in enumerate(parts):
            if isinstance(part, Tensor) and part.requires_grad:
                outputs.append(part)
                leaves.append(part.detach().requires_grad_())
                parts[i] = leaves[-1]
        calls.append((outputs, leaves))
        return pytree.tree_unflatten(parts, structure)

    with _hooked(objective.model, replace):
        losses = objective.losses(batch)
    if len(calls) != 1:
        raise ValueError(
            f"loss_fn calls the model {len(calls)} times: the Gauss-Newton and Fisher matrices need it once"
        )
    outputs, leaves = calls[0]
    if not outputs:
        raise ValueError("the model's outputs do not depend on the chosen parameters")
    if not losses.requires_grad:
        raise ValueError("the loss does not depend on the model's outputs: they were detached, or run under no_grad")
    return outputs, leaves, losses


@contextmanager
def _hooked(model: nn.Module, hook: Any) -> Iterator[None]:
    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _sandwich(objective: Objective, outputs: Vec, middle: Callable[[Vec], Vec]) -> Product:
    """Return ``v ↦ Jᵀ middle(J v)``: J v is the derivative of ``Jᵀ u`` by u, so two backward passes do."""
    once.refuse(outputs)
    u = [torch.zeros_like(z, requires_grad=True) for z in outputs]
    pulled = torch.autograd.grad(outputs, objective.params, u, create_graph=True, materialize_grads=True)
    tied = [i for i, t in enumerate(pulled) if t.requires_grad]

    def product(v: Vec, keep: bool) -> Vec:
        along = _grad([pulled[i] for i in tied], u, [v[i] for i in tied], retain_graph=True)
        return _grad(outputs, objective.params, middle(along), retain_graph=keep)

    return product


def _grad(of: Vec, by: Vec, along: Vec, *, retain_graph: bool) -> Vec:
    return list(torch.autograd.grad(of, by, along, retain_graph=retain_graph, materialize_grads=True))
