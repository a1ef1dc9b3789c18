"""The block of a normalisation layer, from the gradients of single examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import vec
from ..vec import Vec
from .blocks import Seen
from .positions import example_count
from .symmetric import spectrum

Norm: TypeAlias = nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


class NormBlock:
    """Weight γ and bias β of ``y = γ x̂ + β``, with the block ``E[s sᵀ]``, or its diagonal.

    The gradient of example n's log-likelihood is ``sₙ = (Σᵣ gₙᵣ x̂ₙᵣ, Σᵣ gₙᵣ)``, r over the positions. The block is
    exact, except for batch norms in train mode, where it leaves out how an example acts on the likelihood of others.

    Args:
        layer: the layer.
        name: its name.
        own: its parameters that are trained, ``weight``, ``bias`` or both.
        full: whether the whole block is kept, (n, n) for n entries, or its diagonal.
    """

    def __init__(self, layer: Norm, name: str, own: Mapping[str, Tensor], *, full: bool = False) -> None:
        self.layer, self.name, self.params = layer, name, list(own.values())
        self.names, self.full = list(own), full
        self.size = sum(p.numel() for p in self.params)
        self.is_exact = False
        self.dtype = torch.promote_types(self.params[0].dtype, torch.float32)

    def estimate(self, seen: Seen) -> dict[str, Tensor]:
        """Return the block, (n, n), or its diagonal, (n,)."""
        found = self.params[0].new_zeros((self.size,) * (1 + self.full), dtype=self.dtype)
        calls = [(x, [g[i] for g in seen.gradients]) for i, x in enumerate(seen.inputs)]
        normalised = [(self._normalised(x.to(self.dtype)), g) for x, g in calls if g[-1] is not None]
        for k in range(len(seen.gradients)):
            each = [self._slopes(x, g[k], seen.size) for x, g in normalised]
            slopes = sum(s if len(s) == min(map(len, each)) else s.sum(0, keepdim=True) for s in each)
            if isinstance(slopes, Tensor):
                found += slopes.T @ slopes if self.full else slopes.square().sum(0)
        return {"fisher": found / seen.size}

    def rescale(self, seen: Seen, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return nothing: there is no eigenbasis to be corrected."""
        return {}

    def price(self) -> float:
        """The cube of the block's size, if it is full."""
        return float(self.size**3 * self.full)

    def invert(self, state: dict[str, Tensor], damping: float) -> dict[str, Tensor]:
        """Return eigenvalues and eigenvectors of the full block."""
        if not self.full:
            return {}
        values, Q = spectrum(state["fisher"], f"block of {self.name}")
        return {"eigenvalues": values, "Q": Q}

    def solve(self, state: dict[str, Tensor], gradients: Vec, damping: float) -> Vec:
        """Return the damped inverse times the gradients, at least float32."""
        g = vec.join(gradients).to(self.dtype)
        if self.full:
            Q = state["Q"]
            return vec.split(Q @ ((Q.T @ g) / (state["eigenvalues"] + damping)), gradients)
        return vec.split(g / (state["fisher"] + damping), gradients)

    def quadratic(self, state: dict[str, Tensor], d: Vec) -> Tensor:
        """Return ``dᵀ F d``."""
        v = vec.join(d).to(self.dtype)
        return v @ (state["fisher"] @ v if self.full else state["fisher"] * v)

    def _normalised(self, x: Tensor) -> Tensor:
        """Return x̂, what weight and bias are applied to."""
        layer = self.layer
        if isinstance(layer, nn.LayerNorm):
            return F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
        if isinstance(layer, nn.RMSNorm):
            return F.rms_norm(x, layer.normalized_shape, eps=layer.eps)
        if isinstance(layer, nn.GroupNorm):
            return F.group_norm(x, layer.num_groups, eps=layer.eps)
        if layer.training or layer.running_mean is None or layer.running_var is None:
            return F.batch_norm(x, None, None, training=True, eps=layer.eps)
        return F.batch_norm(x, layer.running_mean.to(x), layer.running_var.to(x), eps=layer.eps)

    def _slopes(self, x: Tensor, g: Tensor | None, size: int) -> Tensor:
        """Return the gradient of each example, (examples, n)."""
        assert g is not None
        g = g.to(self.dtype).reshape(x.shape)
        if isinstance(self.layer, nn.LayerNorm | nn.RMSNorm):
            inner = len(self.layer.normalized_shape)
            x, g = (t.unsqueeze(0) if t.ndim == inner else t for t in (x, g))
            x, g = (t.flatten(t.ndim - inner).reshape(len(t), -1, t.shape[-inner:].numel()).mT for t in (x, g))
        else:
            x, g = (t.reshape(*t.shape[:2], -1) for t in (x, g))
        parts = [(g * x if name == "weight" else g).sum(2) for name in self.names]
        rows = torch.cat(parts, dim=1)
        return rows.reshape(example_count([rows], size), -1, self.size).sum(1)
