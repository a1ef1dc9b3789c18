"""K-FAC: the block of a linear layer or a convolution as a Kronecker product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..vec import Vec
from .blocks import Seen
from .positions import Linear, groups, pieces
from .symmetric import damped_inverses, spectrum

Sharing: TypeAlias = Literal["expand", "reduce"]
Form: TypeAlias = Literal["tikhonov", "factored"]


class Kronecker:
    """The weight W and bias of a layer, with the block ``G ⊗ A`` over ``[W, bias]`` of shape (out, in·kernel + 1).

    With aₙᵣ the input of example n at position r, a 1 for the bias at its end, and gₙᵣ the gradient of the example's
    log-likelihood by the output there, the block is ``E[(Σᵣ gₙᵣ ⊗ aₙᵣ)(Σᵣ gₙᵣ ⊗ aₙᵣ)ᵀ]``, and is taken for

    - ``"expand"``: ``A = E[aₙᵣ aₙᵣᵀ]`` over examples and positions, ``G = E[Σᵣ gₙᵣ gₙᵣᵀ]``;
    - ``"reduce"``: ``A = E[āₙ āₙᵀ]`` with āₙ the mean over positions, ``G = E[ḡₙ ḡₙᵀ]`` with ḡₙ the sum.

    Groups of a convolution have factors of their own, and what links two groups is left out. The damped inverse is

    - ``"tikhonov"``: ``(G ⊗ A + λI)⁻¹``, from the eigenvectors of both;
    - ``"factored"``: ``(G + √λ/π I)⁻¹ ⊗ (A + π√λ I)⁻¹``, which is half the work at each step.

    Args:
        layer: the layer.
        name: its name.
        own: its parameters that are trained, ``weight``, ``bias`` or both.
        sharing: of weights between positions, ``"expand"`` or ``"reduce"``.
        form: of the damping, ``"tikhonov"`` or ``"factored"``.

    Cost:
        Of an estimate, as many operations as ``in/out`` forward passes of the layer for A, and ``out/in`` for G, with
        ``in`` counting the kernel. Memory: the two factors, and as much again for what is made of them.

    Source:
        Martens & Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate curvature"; Grosse &
        Martens 2016, "A Kronecker-factored approximate Fisher matrix for convolution layers"; Eschenhagen et al. 2023,
        "Kronecker-factored approximate curvature for modern neural network architectures".
    """

    def __init__(
        self,
        layer: Linear,
        name: str,
        own: Mapping[str, Tensor],
        *,
        sharing: Sharing = "expand",
        form: Form = "tikhonov",
    ) -> None:
        self.layer, self.name, self.params = layer, name, list(own.values())
        self.columns = "weight" in own, "bias" in own
        self.groups = groups(layer)
        self.width = layer.weight[0].numel() * self.columns[0] + self.columns[1], len(layer.weight) // self.groups
        self.dtype = torch.promote_types(self.params[0].dtype, torch.float32)
        self.sharing, self.form = sharing, form
        self.is_exact = form == "tikhonov"

    def estimate(self, seen: Seen) -> dict[str, Tensor]:
        """Return A and G, a matrix for each group of the layer."""
        A, G = (self.params[0].new_zeros(self.groups, n, n, dtype=self.dtype) for n in self.width)
        count = 0
        for a, scores in pieces(self.layer, seen, self.columns, self.dtype):
            if self.sharing == "reduce":
                a, scores = a.mean(3, keepdim=True), [g.sum(3, keepdim=True) for g in scores]
            A += _gram(a)
            for g in scores:
                G += _gram(g)
            count += a.shape[2] * a.shape[3]
        return {"A": A / max(1, count), "G": G / seen.size}

    def rescale(self, seen: Seen, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return nothing: the eigenvalues are products of those of A and G."""
        return {}

    def price(self) -> float:
        """The cubes of the factors' sizes."""
        return float(self.groups * sum(n**3 for n in self.width))

    def invert(self, state: dict[str, Tensor], damping: float) -> dict[str, Tensor]:
        """Return eigenvalues and eigenvectors of both factors, or their damped inverses."""
        if self.form == "factored":
            A, G = damped_inverses(state["A"], state["G"], damping, self.name)
            return {"A_inverse": A, "G_inverse": G}
        lA, QA = spectrum(state["A"], f"input factor of {self.name}")
        lG, QG = spectrum(state["G"], f"output factor of {self.name}")
        return {"QA": QA, "QG": QG, "eigenvalues": lG.unsqueeze(2) * lA.unsqueeze(1)}

    def solve(self, state: dict[str, Tensor], gradients: Vec, damping: float) -> Vec:
        """Return the damped inverse times the gradients, at least float32."""
        g = self._matrix(gradients)
        if self.form == "factored":
            return self._tensors(state["G_inverse"] @ g @ state["A_inverse"], gradients)
        QA, QG = state["QA"], state["QG"]
        rotated = QG.mT @ g @ QA
        return self._tensors(QG @ (rotated / (state["eigenvalues"] + damping)) @ QA.mT, gradients)

    def quadratic(self, state: dict[str, Tensor], d: Vec) -> Tensor:
        """Return ``dᵀ (G ⊗ A) d``, with the factors that were inverted; for ``"factored"`` with those of today."""
        v = self._matrix(d)
        if self.form == "factored":
            return (v * (state["G"] @ v @ state["A"])).sum()
        return (state["eigenvalues"] * (state["QG"].mT @ v @ state["QA"]).square()).sum()

    def _matrix(self, tensors: Vec) -> Tensor:
        """Return tensors of weight and bias as one matrix for each group, (groups, out, in)."""
        return torch.cat([t.to(self.dtype).reshape(self.groups, self.width[1], -1) for t in tensors], dim=2)

    def _tensors(self, matrix: Tensor, like: Vec) -> Vec:
        """Return what `_matrix` would have made the matrix of."""
        sizes = [t.numel() // (self.groups * self.width[1]) for t in like]
        return [part.reshape(t.shape) for part, t in zip(torch.split(matrix, sizes, dim=2), like, strict=True)]


def _gram(t: Tensor) -> Tensor:
    """Return ``Σ t tᵀ`` over examples and positions, (groups, n, n), without computing both halves of it."""
    rows, n = t.flatten(2), t.shape[1]
    if n < 160:
        return rows @ rows.mT
    first, last = t[:, : n // 2], t[:, n // 2 :]
    corner = last.flatten(2) @ first.flatten(2).mT
    upper = torch.cat([_gram(first), corner.mT], dim=2)
    return torch.cat([upper, torch.cat([corner, _gram(last)], dim=2)], dim=1)
