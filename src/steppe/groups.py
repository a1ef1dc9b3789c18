"""Parameter groups with a radius of their own."""

from __future__ import annotations

import math
import numbers
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def radii(base: Optimizer) -> dict[Tensor, float]:
    """Return the radius of each parameter whose group has one: the key ``"rho"``.

    A base that has a rho of its own, as Adadelta its averaging factor, keeps it for itself.

    Raises:
        ValueError: if a radius is negative or not finite, or is 0 where the base has a rho of its own.
    """
    found: dict[Tensor, float] = {}
    if "rho" in base.defaults:
        if any(group["rho"] == 0 for group in base.param_groups):
            raise ValueError(f"{type(base).__name__} takes the rho=0 of a parameter group for its own: no group can be "
                             "left unperturbed with this base")  # fmt: skip
        return found
    for i, group in enumerate(base.param_groups):
        rho = group.get("rho")
        if rho is None:
            continue
        if not isinstance(rho, (numbers.Real, Tensor)) or not 0 <= float(rho) < math.inf:
            raise ValueError(f"rho={rho!r} of parameter group {i} must be a finite number ≥ 0")
        found.update(dict.fromkeys(group["params"], float(rho)))
    return found


def norm_layers_only(model: nn.Module) -> list[dict[str, Any]]:
    """Return two parameter groups such that only normalisation layers are perturbed (SAM-ON).

    ``ε = ρ g0/‖g0‖`` over the parameters of normalisation layers, 0 elsewhere; the weight gradients of the others are
    left out of pass one where only ε needs them. For ``SGD(steppe.norm_layers_only(model), lr=0.1)``.

    Args:
        model: a network; a layer counts if torch knows it, or if its class has "Norm" in its name.

    Raises:
        ValueError: if it has no such layer with parameters.

    Source:
        Müller et al. 2023, "Normalization layers are all that sharpness-aware minimization needs".
    """
    layers = [m for m in model.modules() if isinstance(m, NORMS) or "Norm" in type(m).__name__]
    inside = {p: None for layer in layers for p in layer.parameters(recurse=False)}
    if not inside:
        raise ValueError(f"{type(model).__name__} has no normalisation layer with parameters")
    outside = [p for p in model.parameters() if p not in inside]
    return [{"params": list(inside)}, {"params": outside, "rho": 0.0}]
