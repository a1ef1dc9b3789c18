"""The natural gradient (Martens 2020) with every Fisher matrix written out densely, for perceptrons."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .common import Tensors


def minus_log(z: Tensor, y: Tensor, likelihood: str) -> Tensor:
    """-log p(y | z), up to a constant, of one example."""
    return -z.log_softmax(0)[y] if likelihood == "categorical" else 0.5 * ((z - y) ** 2).sum()


def scores(model: nn.Module, x: Tensor, likelihood: str) -> list[list[tuple[Tensor, Tensor]]]:
    """Of each example, what labels there may be: weights and losses that add up to the expectation of outer products.

    For means the slopes are normal with covariance 1, so those of unit vectors do.
    """
    found = []
    for example in x:
        z = model(example[None])[0]
        if likelihood == "categorical":
            p = z.detach().softmax(0)
            found.append([(p[c], minus_log(z, torch.tensor(c), likelihood)) for c in range(len(z))])
        else:
            found.append([(torch.tensor(1.0), z[j]) for j in range(len(z))])
    return found


def drawn(model: nn.Module, x: Tensor, labels: list[Tensor], likelihood: str) -> list[list[tuple[Tensor, Tensor]]]:
    """The same for labels that were drawn; of means, `labels` are the slopes."""
    found = []
    for n, example in enumerate(x):
        z = model(example[None])[0]
        slopes = [minus_log(z, y[n], likelihood) if likelihood == "categorical" else (z * y[n]).sum() for y in labels]
        found.append([(torch.tensor(1.0 / len(labels)), slope) for slope in slopes])
    return found


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All entries, one after the other."""
    return torch.cat([t.reshape(-1) for t in tensors])


def dense_fisher(params: Tensors, labels: list[list[tuple[Tensor, Tensor]]]) -> Tensor:
    """F = (1/B) sum_n E_y[g g^T]."""
    size = sum(p.numel() for p in params)
    F = torch.zeros(size, size, dtype=params[0].dtype)
    for example in labels:
        for weight, loss in example:
            g = flat(torch.autograd.grad(loss, params, retain_graph=True))
            F += weight * torch.outer(g, g) / len(labels)
    return F


class Natural:
    """m <- mu m + g; d = (F + L)^-1 m; u = s lr d; w <- w - lr wd w - u; s such that 1/2 u'Fu <= kl.

    F is a running average of dense matrices, looked at every n steps.
    """

    def __init__(
        self,
        params: Tensors,
        lr: Tensor,
        damping: Tensor,
        mu: float,
        wd: float,
        decay: float,
        n: int,
        kl: float | None,
    ) -> None:
        self.params, self.lr, self.damping = params, lr, damping  # the last two with an entry for each weight
        self.mu, self.wd, self.decay, self.n, self.kl = mu, wd, decay, n, kl
        self.m = torch.zeros(len(lr), dtype=lr.dtype)
        self.t = 0

    def average(self, name: str, new: Tensor) -> None:
        """The first one is itself."""
        old = getattr(self, name, None)
        setattr(self, name, new if old is None else self.decay * old + (1 - self.decay) * new)

    def solve(self, g: Tensor) -> Tensor:
        return torch.linalg.solve(self.F + torch.diag(self.damping), g)

    def matrix(self) -> Tensor:
        return self.F

    def step(self, g: Tensor) -> None:
        self.m = self.mu * self.m + g
        u = self.lr * self.solve(self.m)
        if self.kl is not None:
            size = 0.5 * u @ self.matrix() @ u
            u = u * min(1.0, float((self.kl / size).sqrt()))
        w = flat(self.params).detach()
        w = w - self.lr * self.wd * w - u
        with torch.no_grad():
            for p, new in zip(self.params, w.split([p.numel() for p in self.params]), strict=True):
                p.copy_(new.view_as(p))
        self.t += 1


class Kronecker(Natural):
    """K-FAC and EKFAC of a perceptron whose parameters are weight, bias, weight, bias, ...

    A and G are averaged every n steps; their eigenbasis, or inverse, is made anew every `every` steps.
    """

    corrected = False
    every = 1

    def look(self, inputs: Tensors, slopes: list[Tensors]) -> None:
        """`inputs` of the layers, (B, in); `slopes` of the layers' outputs, for each draw, (B, out)."""
        anew = self.t % self.every == 0
        self.bases = {} if anew else self.bases
        for i, a in enumerate(inputs):
            B = len(a)
            a = torch.cat([a, a.new_ones(B, 1)], 1)
            self.average(f"A{i}", a.T @ a / B)
            self.average(f"G{i}", sum(g[i].T @ g[i] / B / len(slopes) for g in slopes))
            if anew:
                self.bases[i] = torch.linalg.eigh(getattr(self, f"A{i}")), torch.linalg.eigh(getattr(self, f"G{i}"))
            if self.corrected:
                (_, QA), (_, QG) = self.bases[i]
                if anew and hasattr(self, f"S{i}"):
                    delattr(self, f"S{i}")
                examples = [torch.einsum("no,ni->noi", g[i], a) for g in slopes]
                self.average(f"S{i}", sum(((QG.T @ e @ QA) ** 2).mean(0) / len(slopes) for e in examples))

    def blocks(self) -> list[Tensor]:
        """The dense blocks over (out, in + 1), of the factors that were inverted."""
        found = []
        for i, ((lA, QA), (lG, QG)) in self.bases.items():
            Q = torch.kron(QG, QA)
            if self.corrected:
                found.append(Q @ torch.diag(getattr(self, f"S{i}").reshape(-1)) @ Q.T)
            else:
                found.append(Q @ torch.diag(torch.kron(lG, lA)) @ Q.T)
        return found

    def ordered(self, blocks: list[Tensor]) -> Tensor:
        """The dense matrix over weight, bias, weight, ..."""
        places = []
        start = 0
        for W, b in zip(self.params[::2], self.params[1::2], strict=True):
            weight = start + torch.arange(W.numel()).view_as(W)
            bias = start + W.numel() + torch.arange(len(b))
            places.append(torch.cat([weight, bias[:, None]], 1).reshape(-1))
            start += W.numel() + len(b)
        where = torch.cat(places)
        whole = torch.empty(start, start, dtype=self.lr.dtype)
        whole[where[:, None], where[None]] = torch.block_diag(*blocks)
        return whole

    def matrix(self) -> Tensor:
        return self.ordered(self.blocks())

    def solve(self, g: Tensor) -> Tensor:
        return torch.linalg.solve(self.matrix() + torch.diag(self.damping), g)
