"""AdaHessian (Yao 2021): Adam with the Hessian's diagonal, by Hutchinson's method, in the place of the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .common import Data, Losses, Tensors, gradient


class AdaHessian:
    """Algorithm 1 with decoupled decay; between probes the last diagonal stands in, as in the official code.

    `probes` of a step are its vectors z, each a list of tensors beside the parameters.
    """

    def __init__(
        self,
        params: Tensors,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        decay: float = 0.0,
        k: float = 1.0,
        b: int | str = 1,
        average: str = "absolute",
        tables: Tensors = (),  # type: ignore[assignment]
    ) -> None:
        self.params, self.lr, self.betas, self.eps = params, lr, betas, eps
        self.decay, self.k, self.b, self.average, self.tables = decay, k, b, average, tables
        self.m = [torch.zeros_like(w) for w in params]
        self.v = [torch.zeros_like(w) for w in params]
        self.t = 0
        self.d: Tensors = []

    def diagonal(self, loss: Tensor, g: Tensors, probes: list[Tensors]) -> Tensors:
        total = [torch.zeros_like(w) for w in self.params]
        for z in probes:
            along = sum((a * b).sum() for a, b in zip(g, z, strict=True))
            assert isinstance(along, Tensor)
            for i, product in enumerate(gradient_again(along, self.params)):
                total[i] += z[i] * product / len(probes)
        return total

    def averaged(self, w: Tensor, d: Tensor) -> Tensor:
        d = d.abs() if self.average == "absolute" else d
        result = d.clone()
        if d.ndim == 2:
            b = d.shape[1] if self.b == "row" or any(w is table for table in self.tables) else int(self.b)
            for row in range(d.shape[0]):
                for i in range(0, d.shape[1], b):
                    result[row, i : i + b] = d[row, i : i + b].mean()
        if d.ndim > 2:
            for i in range(d.shape[0]):
                for j in range(d.shape[1]):
                    result[i, j] = d[i, j].mean()
        return result

    def step(self, model: nn.Module, losses: Losses, batch: Data, probes: list[Tensors] | None = None) -> None:
        loss = losses(model, batch).mean()
        g = gradient(loss, self.params, create_graph=probes is not None)
        if probes is not None:
            found = self.diagonal(loss, g, probes)
            self.d = [self.averaged(w, d) for w, d in zip(self.params, found, strict=True)]
        self.t += 1
        b1, b2 = self.betas
        with torch.no_grad():
            for i, w in enumerate(self.params):
                self.m[i] = b1 * self.m[i] + (1 - b1) * g[i]
                self.v[i] = b2 * self.v[i] + (1 - b2) * self.d[i] ** 2
                m, v = self.m[i] / (1 - b1**self.t), (self.v[i] / (1 - b2**self.t)).sqrt() ** self.k
                w.copy_(w - self.lr * self.decay * w - self.lr * m / (v + self.eps))


def gradient_again(along: Tensor, params: Tensors) -> Tensors:
    """A second derivative; the graph is kept for the next one."""
    grads: tuple[Any, ...] = torch.autograd.grad(along, params, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
