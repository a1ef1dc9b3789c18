"""EKFAC: K-FAC's eigenvectors with the second moments that the gradients have along them."""

from __future__ import annotations

from torch import Tensor

from ..vec import Vec
from .blocks import Seen
from .kronecker import Kronecker
from .positions import pieces
from .symmetric import spectrum


class EigenKronecker(Kronecker):
    """The block ``(Q_G ⊗ Q_A) S (Q_G ⊗ Q_A)ᵀ``, with Q the eigenvectors of K-FAC's factors and S diagonal.

    ``S = E[((Q_G ⊗ Q_A)ᵀ Σᵣ gₙᵣ ⊗ aₙᵣ)²]`` are the second moments of the gradients of examples: the diagonal of the
    block in this basis, and of all S the one with the least error in the Frobenius norm. The damping is Tikhonov's,
    ``S + λ``. The arguments are those of `Kronecker`.

    Raises:
        ValueError: if the damping is to be factored.

    Cost:
        Beside K-FAC's, the gradients of all examples in turn, and their rotation. What passes showed of the layer is
        kept until then.

    Source:
        George et al. 2018, "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis".
    """

    def rescale(self, seen: Seen, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the second moments S, (groups, out, in)."""
        QA, QG = state["QA"], state["QG"]
        S = QA.new_zeros(self.groups, self.width[1], self.width[0])
        for a, scores in pieces(self.layer, seen, self.columns, self.dtype):
            for g in scores:
                S += _moments(a, g, QA, QG)
        return {"moments": S / seen.size}

    def invert(self, state: dict[str, Tensor], damping: float) -> dict[str, Tensor]:
        """Return the eigenvectors of both factors."""
        if self.form == "factored":
            raise ValueError(f'{self.name}: EKFAC is no product, so its damping has no factors: take form="tikhonov"')
        QA = spectrum(state["A"], f"input factor of {self.name}")[1]
        return {"QA": QA, "QG": spectrum(state["G"], f"output factor of {self.name}")[1]}

    def solve(self, state: dict[str, Tensor], gradients: Vec, damping: float) -> Vec:
        """Return the damped inverse times the gradients, at least float32."""
        QA, QG = state["QA"], state["QG"]
        rotated = QG.mT @ self._matrix(gradients) @ QA
        return self._tensors(QG @ (rotated / (state["moments"] + damping)) @ QA.mT, gradients)

    def quadratic(self, state: dict[str, Tensor], d: Vec) -> Tensor:
        """Return ``dᵀ F d``."""
        rotated = state["QG"].mT @ self._matrix(d) @ state["QA"]
        return (state["moments"] * rotated * rotated).sum()


def _moments(a: Tensor, g: Tensor, QA: Tensor, QG: Tensor) -> Tensor:
    """Return ``Σₙ (Q_Gᵀ (Σᵣ gₙᵣ aₙᵣᵀ) Q_A)²``, by the cheaper of two orders."""
    m, n, positions = a.shape[1], g.shape[1], a.shape[3]
    if positions == 1:
        a, g = QA.mT @ a.flatten(2), QG.mT @ g.flatten(2)
        return (g * g) @ (a * a).mT
    if positions * (m * m + n * n) < m * n * (m + n):
        a, g = (QA.mT @ a.flatten(2)).reshape(a.shape), (QG.mT @ g.flatten(2)).reshape(g.shape)
        rotated = g.permute(2, 0, 1, 3) @ a.permute(2, 0, 3, 1)
    else:
        rotated = QG.mT @ (g.permute(2, 0, 1, 3) @ a.permute(2, 0, 3, 1)) @ QA
    return (rotated * rotated).sum(0)
