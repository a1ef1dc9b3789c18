"""Every recipe with its important nestings, and how to run one on a tiny network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, RMSprop

import nets
import steppe

torch.set_num_threads(1)

TOTAL = 12
EVERY = [
    "sgd()",
    "sam()",
    "sam(p=inf)",
    "sam(p=3)",
    "sam(steps=2)",
    "sam(second_order=True)",
    "asam()",
    "asam(by_name=True)",
    "mixed_sam()",
    "m_sharpness(sam(), 5)",
    "m_sharpness(esam(), 5)",
    "m_sharpness(gsam(), 5)",
    "m_sharpness(rwp(), 5)",
    "gnr(strength=0.5)",
    "gsam()",
    "gsam(asam())",
    "gsam(rho_min=0.01)",
    "gsam_min()",
    "gsam_penalty()",
    "looksam(k=2)",
    "looksam(asam(), k=3)",
    "esam()",
    "esam(asam())",
    "esam(sam(steps=2))",
    "esam_swp()",
    "esam_sds()",
    "esam_sds(gsam())",
    "ssam(refresh=2)",
    "ssam(asam(), refresh=2)",
    "esam_sds(ssam(refresh=2))",
    "ssam_dynamic(refresh=2)",
    "rwp()",
    "rwp(alpha=0)",
    "rwp(other=True)",
    "rst(sam(), p=0.5)",
    "rst(esam(), p=0.5)",
    "rst(looksam(k=2), p=linear(0, 1))",
    "rst(rwp(), p=piecewise(0.2, 0.5))",
    "rst(ssam_dynamic(refresh=2), p=cosine())",
    "grst(sam(), p=sine(flipped=True))",
    "grst(gsam(), p=0.5, strength=2)",
    "grst(looksam(k=2), p=0.7)",
    "grst(sam(second_order=True), p=0.5)",
]
"""Expressions that cover every recipe."""

DETERMINISTIC = [text for text in EVERY if not any(word in text for word in ("rst", "esam(", "esam_swp"))]
"""Those whose passes do not depend on a draw."""

BASES: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda params: SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda params: AdamW(params, lr=1e-2),
    "rmsprop": lambda params: RMSprop(params, lr=1e-2),
}


def wrap(model: nn.Module, text: str, base: str = "sgd", **kwargs: Any) -> steppe.SharpnessAware:
    """The method around a base optimizer of the model's parameters."""
    kwargs.setdefault("total_steps", TOTAL)
    return steppe.SharpnessAware(BASES[base](model.parameters()), steppe.parse(text), **kwargs)


def step(opt: steppe.SharpnessAware, model: nn.Module, data: Any, loss_fn: Any = nets.losses, **kwargs: Any) -> Tensor:
    """One step, with a second batch where the method takes one."""
    second = None
    if opt.method.needs_second:
        second = steppe.Batch(
            model, loss_fn, tuple(t.flip(0) * t.new_tensor(0.9).to(t.dtype) for t in data[:1]) + data[1:]
        )
    return opt.step(steppe.Batch(model, loss_fn, data, **kwargs), second)


def weights(model: nn.Module) -> list[Tensor]:
    """A copy of all parameters and buffers."""
    return [t.detach().clone() for t in model.state_dict().values()]


def same(a: Any, b: Any) -> bool:
    """Whether two nests of tensors and values are equal to the bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def snapshot(opt: steppe.SharpnessAware) -> Any:
    """A copy of the base's state and of the method's memories, and which of these are more than stand-ins."""
    saved = opt.state_dict()
    return copy.deepcopy([saved["state"], saved["param_groups"][0]["steppe"]["memories"]])
