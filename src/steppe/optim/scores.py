"""Scores: slopes of the log-likelihood by the model's outputs, with labels of the model's own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Generator, Tensor, nn
from torch.utils import _pytree as pytree

from ..curvature.products import Likelihood, score

Calls: TypeAlias = list[list[tuple[Tensor, Tensor]]]


@contextmanager
def noted(model: nn.Module) -> Iterator[Calls]:
    """Note the outputs of each call of the model, beside the views of them that the loss is made of."""
    calls: Calls = []

    def note(module: nn.Module, inputs: Any, output: Any) -> Any:
        parts, structure = pytree.tree_flatten(output)
        pairs = []
        for i, part in enumerate(parts):
            if isinstance(part, Tensor) and part.requires_grad:
                parts[i] = part.view_as(part)  # a node of its own: hidden states, too, are part of what logits come of
                pairs.append((part, parts[i]))
        calls.append(pairs)
        return pytree.tree_unflatten(parts, structure)

    handle = model.register_forward_hook(note)
    try:
        yield calls
    finally:
        handle.remove()


def used(calls: Calls, losses: Tensor, size: int, likelihood: Likelihood) -> Tensor:
    """Return the one output that the loss is made of.

    Raises:
        ValueError: unless the model was called once, and it is logits (size, C) or means (size, ...).
    """
    if len(calls) != 1:
        raise ValueError(f"loss_fn calls the model {len(calls)} times: labels of its own need it once; "
                         'or take labels="data"')  # fmt: skip
    pairs = calls[0]
    if len(pairs) > 1:
        slopes = torch.autograd.grad(losses.sum(), [view for _, view in pairs], retain_graph=True, allow_unused=True)
        pairs = [pair for pair, slope in zip(pairs, slopes, strict=True) if slope is not None]
    if len(pairs) != 1 or pairs[0][0].shape[:1] != (size,) or (likelihood == "categorical" and pairs[0][0].ndim != 2):
        shapes = ", ".join(str(tuple(z.shape)) for z, _ in pairs)
        wanted = "logits (B, C)" if likelihood == "categorical" else "means (B, ...)"
        raise ValueError(f"labels of the model's own need one output, {wanted} for {size} examples; the loss uses "
                         f'{shapes or "none"}: let loss_fn take such outputs, or labels="data"')  # fmt: skip
    return pairs[0][0]


def scores(outputs: Tensor, likelihood: Likelihood, draws: int | None, generator: Generator) -> list[Tensor]:
    """Return tensors s_k, shaped as the outputs, with ``E Σ_k s_kn s_knᵀ`` the Fisher matrix of example n's outputs.

    Args:
        outputs: logits (B, C) or means (B, ...).
        likelihood: which of the two, ``"categorical"`` or ``"gaussian"`` at variance 1.
        draws: labels drawn for each example, as many tensors; None for the exact expectation: C tensors, or one for
            each entry of the means.
        generator: draws the labels, on the device of the outputs.

    Returns:
        The tensors, at least float32; not a number where an output is not finite.
    """
    z = outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32))
    if not bool(z.isfinite().all()):
        return [torch.full_like(z, math.nan)]
    if draws is not None:
        return [score(z, likelihood, generator) / math.sqrt(draws) for _ in range(draws)]
    if likelihood == "gaussian":
        ones = torch.eye(z[0].numel(), dtype=z.dtype, device=z.device)
        return [one.view(z.shape[1:]).expand_as(z) for one in ones]
    p, ones = z.softmax(1), torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    return [p[:, k : k + 1].sqrt() * (p - ones[k]) for k in range(z.shape[1])]
