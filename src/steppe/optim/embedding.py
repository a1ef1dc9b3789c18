"""The block of an embedding, whose inputs are rows of the identity."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..vec import Vec
from .blocks import Seen
from .kronecker import Form
from .positions import example_count
from .symmetric import damped_inverses, spectrum


class EmbeddingBlock:
    """The weight (V, d) of an embedding, with the block ``A ⊗ G``, or in the eigenbasis of that its exact diagonal.

    A is diagonal: how often each row is looked up, as a share of all look-ups. ``G = E[Σᵣ gₙᵣ gₙᵣᵀ]``, r over the
    look-ups of an example. Those of ``padding_idx`` do not count, for they train nothing. Positions are counted as in
    "expand", and the damping is that of `Kronecker`.

    Args:
        layer: the embedding.
        name: its name.
        corrected: whether the diagonal in the eigenbasis is exact, as in `EigenKronecker`.
        form: of the damping, ``"tikhonov"`` or ``"factored"``.
    """

    def __init__(self, layer: nn.Embedding, name: str, *, corrected: bool = False, form: Form = "tikhonov") -> None:
        self.layer, self.name, self.params = layer, name, [layer.weight]
        self.is_exact = False
        self.corrected, self.form = corrected, form
        self.dtype = torch.promote_types(layer.weight.dtype, torch.float32)

    def estimate(self, seen: Seen) -> dict[str, Tensor]:
        """Return A, (V,), and G, (d, d)."""
        (V, d), weight = self.layer.weight.shape, self.layer.weight
        A, G = weight.new_zeros(V, dtype=self.dtype), weight.new_zeros(d, d, dtype=self.dtype)
        for rows, scores, trains in self._calls(seen):
            A.index_add_(0, rows, trains)
            for g in scores:
                G += g.T @ g
        return {"A": A / A.sum().clamp_min(1), "G": G / seen.size}

    def rescale(self, seen: Seen, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the second moments of the rotated gradients of examples, (V, d)."""
        if not self.corrected:
            return {}
        calls, V, QG = self._calls(seen), len(self.layer.weight), state["QG"]
        S = QG.new_zeros(V, len(QG))
        if not calls:
            return {"moments": S}
        count = example_count([x if x.ndim else x[None] for x in seen.inputs], seen.size)
        example = torch.cat([torch.arange(len(rows), device=rows.device) * count // len(rows) for rows, _, _ in calls])
        rows = torch.cat([rows for rows, _, _ in calls])
        keys, where = torch.unique(example * V + rows, return_inverse=True)
        for k in range(len(seen.gradients)):
            g = torch.cat([scores[k] for _, scores, _ in calls]) @ QG
            S.index_add_(0, keys % V, g.new_zeros(len(keys), len(QG)).index_add_(0, where, g).square_())
        return {"moments": S / seen.size}

    def price(self) -> float:
        """The cube of the embedding's width."""
        return float(self.layer.embedding_dim) ** 3

    def invert(self, state: dict[str, Tensor], damping: float) -> dict[str, Tensor]:
        """Return eigenvalues and eigenvectors of G, or the damped inverses of A and G."""
        if self.form == "factored" and not self.corrected:
            A, G = damped_inverses(state["A"][None], state["G"][None], damping, self.name)
            return {"A_inverse": A[0], "G_inverse": G[0]}
        values, QG = spectrum(state["G"], f"output factor of {self.name}")
        return {"QG": QG} if self.corrected else {"QG": QG, "eigenvalues": values}

    def solve(self, state: dict[str, Tensor], gradients: Vec, damping: float) -> Vec:
        """Return the damped inverse times the gradient, at least float32."""
        g = gradients[0].to(self.dtype)
        if self.form == "factored" and not self.corrected:
            return [state["A_inverse"][:, None] * g @ state["G_inverse"]]
        QG = state["QG"]
        return [(g @ QG / (self._moments(state) + damping)) @ QG.T]

    def quadratic(self, state: dict[str, Tensor], d: Vec) -> Tensor:
        """Return ``dᵀ F d``."""
        v = d[0].to(self.dtype)
        if not self.corrected:
            return (state["A"][:, None] * v * (v @ state["G"])).sum()
        return (state["moments"] * (v @ state["QG"]).square()).sum()

    def _moments(self, state: dict[str, Tensor]) -> Tensor:
        return state["moments"] if self.corrected else state["A"][:, None] * state["eigenvalues"]

    def _calls(self, seen: Seen) -> list[tuple[Tensor, Vec, Tensor]]:
        """Return of each call the rows that are looked up, their gradients for each score, and 1 or 0 for padding."""
        found = []
        for i, x in enumerate(seen.inputs):
            rows, padding = x.reshape(-1), self.layer.padding_idx
            trains = (rows != (-1 if padding is None else padding)).to(self.dtype)
            slopes = [each[i] for each in seen.gradients]
            scores = [g.to(self.dtype).reshape(len(rows), -1) * trains[:, None] for g in slopes if g is not None]
            if scores:
                found.append((rows, scores, trains))
        return found
