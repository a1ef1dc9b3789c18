"""LoRA through peft: noise on the merged weights. Adapters alone are perturbed by every method, as they are trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.lora import Conv2d, Linear, LoraLayer
from peft.tuners.lora.layer import Conv1d, Conv3d
from torch import Generator, Tensor, nn

from .. import checks, vec
from ..step import SharpnessAware


@contextmanager
def flat_lora(model: nn.Module, opt: SharpnessAware, sigma: float = 0.05) -> Iterator[None]:
    """Run a step at randomly perturbed merged weights (Flat-LoRA).

    ``W' = W + s B A``;  ``ε_ij ~ N(0, σ²‖W'_i‖²/n)`` on row i of every layer with an adapter, n the layer's inputs.

    The frozen W is moved by ε, so that every pass inside sees W' + ε, and the adapters are trained on the gradients
    taken there; afterwards W is copied back, the old one to the bit, whatever was raised. The paper's method takes one
    pass, ``steppe.sgd()``, and lets σ grow over the training, as ``sigma * (1 - cos(pi * step / total)) / 2``::

        with flat_lora(model, opt, sigma=0.05):
            opt.step(steppe.Batch(model, loss_fn, batch))

    Args:
        model: a network with LoRA adapters on linear or convolutional layers, maybe wrapped in
            ``DistributedDataParallel``.
        opt: the optimizer of the adapters: ε is a function of its seed and its step, the same on all ranks.
        sigma: σ, deviation of a layer's outputs under ε in units of the outputs' own. Default 0.05; 0.15 for CLIP
            ViT-B/32.

    Raises:
        ValueError: if sigma < 0, or the model has no such adapter, or one on another layer, quantised or sharded.

    Cost:
        No propagation of its own; a copy of the weights that have adapters.

    Source:
        Li et al. 2025, "Flat-LoRA: low-rank adaptation over a flat loss landscape", eq. 7.
    """
    checks.non_negative(sigma=sigma)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRA adapter: make it by peft.get_peft_model")
    point, generators = opt._point([], 0), dict[torch.device, Generator]()
    with ExitStack() as stack:
        for name, layer in layers.items():
            weight = _weight(name, layer)
            generator = generators.setdefault(weight.device, point.generator("flat_lora", weight.device))
            stack.callback(vec.copy_, [weight], [weight.clone()])
            weight.add_(_noise(layer, weight, generator).mul_(sigma))
        yield


def _weight(name: str, layer: Any) -> Tensor:
    """Return the frozen weight under an adapter."""
    base = layer.get_base_layer()
    if not isinstance(layer, (Linear, Conv1d, Conv2d, Conv3d)):
        raise ValueError(f"{name} is of type {type(layer).__name__}: only linear and convolutional layers take noise")
    weight: Tensor = base.weight.detach()  # shares memory
    if not weight.is_floating_point() or hasattr(weight, "to_local"):
        raise ValueError(f"{name} is quantised or sharded: noise needs the whole weight in floating point")
    return weight


@torch.no_grad()
def _noise(layer: Any, weight: Tensor, generator: Generator) -> Tensor:
    """Return normal noise of deviation ``‖W'_i‖/√n`` on row i."""
    merged = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            merged = merged + layer.get_delta_weight(adapter)
    rows = 1 if getattr(layer, "fan_in_fan_out", False) else 0
    dims = [dim for dim in range(weight.ndim) if dim != rows]
    inputs = weight.numel() / weight.shape[rows]
    noise = torch.randn(weight.shape, dtype=merged.dtype, device=weight.device, generator=generator)
    return noise.mul_(torch.linalg.vector_norm(merged, dim=dims, keepdim=True)).div_(math.sqrt(inputs))
