"""Curvature matrices of a mean loss, known by their products with vectors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from .. import once
from .objective import Objective, exact
from .products import Likelihood, Product, empirical, fisher, gauss_newton, hessian

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

Kind: TypeAlias = Literal["hessian", "ggn", "fisher", "empirical"]
COST = {"hessian": 2.0, "ggn": 4 / 3, "fisher": 4 / 3, "empirical": 4 / 3}


class Operator:
    """A symmetric matrix of curvature: ``A @ v``, for v of shape (n,) or (n, k).

    With the weighted mean over all examples i, the outputs z of the model and their Jacobian J:

    - ``"hessian"``: ``∇²L``
    - ``"ggn"``: ``E[Jᵀ (∇²ℓ) J]``, ∇² over z: the generalised Gauss-Newton matrix
    - ``"fisher"``: ``E[Jᵀ s sᵀ J]``, s the slope of ``−log p(y | z)`` with y drawn from the model itself
    - ``"empirical"``: ``E[∇ℓ ∇ℓᵀ]``, with the labels of the data: the empirical Fisher matrix

    Every product is two backward passes (never forward-mode differentiation, which is wrong on layer norms), run as
    `steppe.curvature.still` says: fused attention is replaced by the math kernel, compiled models run eagerly.

    Args:
        objective: the mean loss and the parameters.
        kind: which of the four.
        draws: of labels of the model's own for each example, if ``kind="fisher"``; default None for their exact
            expectation. The same are drawn in every product.
        likelihood: what the outputs mean for ``"fisher"``: ``"categorical"`` for logits (B, C), or ``"gaussian"`` for
            means at variance 1. None, the default, is categorical; a loss that is no cross-entropy is refused then.
        seed: of these draws.
        reuse: whether the batches' graphs are kept from one product to the next, while the weights do not change. By
            default they are if there is only one batch. Memory: the graphs of all batches.

    Raises:
        ValueError: from products, if the loss is not finite, not twice differentiable, or changes between them.

    Cost:
        Of a product, 3 gradients of the data for the Hessian, else 7/3; 1 less where the graph is reused, and for each
        but the first column of v.

    Source:
        Pearlmutter 1994, "Fast exact multiplication by the Hessian"; Schraudolph 2002, "Fast curvature matrix-vector
        products for second-order gradient descent"; Martens 2020, "New insights and perspectives on the natural
        gradient method".
    """

    def __init__(
        self,
        objective: Objective,
        kind: Kind = "hessian",
        *,
        draws: int | None = None,
        likelihood: Likelihood | None = None,
        seed: int = 0,
        reuse: bool | None = None,
    ) -> None:
        if kind not in COST:
            raise ValueError(f"kind={kind!r} is none of {', '.join(map(repr, COST))}")
        if likelihood not in (None, "categorical", "gaussian"):
            raise ValueError(f'likelihood={likelihood!r} is neither "categorical" nor "gaussian"')
        if draws is not None and (draws < 1 or kind != "fisher"):
            raise ValueError(f'draws={draws!r}: at least 1, and only for kind="fisher"')
        self.objective, self.kind = objective, kind
        self.size, self.device, self.dtype = objective.size, objective.device, objective.dtype
        self._draws, self._likelihood, self._seed, self._reuse = draws or 0, likelihood, seed, reuse
        self._kept: list[tuple[Product, Tensor, int]] = []
        self._made_at: list[float] = []
        self._places = torch.empty(0)

    def __matmul__(self, v: Tensor) -> Tensor:
        """Return the product, shaped as ``v``."""
        if v.ndim not in (1, 2) or len(v) != self.size:
            raise ValueError(f"a vector of shape {tuple(v.shape)} for a matrix of {self.size} rows")
        vectors = [self.objective.split(column) for column in v.reshape(self.size, -1).T.contiguous()]
        total = torch.zeros(self.size, len(vectors), dtype=self.dtype, device=self.device)
        weight = torch.zeros((), dtype=exact(self.device), device=self.device)
        reuse = self.objective.is_single if self._reuse is None else self._reuse
        with self.objective.still(), torch.enable_grad():
            for product, weights, size in self._products(reuse):
                for j, vector in enumerate(vectors):
                    with once.in_words():
                        total[:, j] += self.objective.join(product(vector, reuse or j + 1 < len(vectors)))
                    self.objective.count(COST[self.kind], size)
                weight += weights.to(weight).sum()
        found = self.objective.mean(total, weight).reshape(v.shape)
        if not found.isfinite().all():
            if not v.isfinite().all():
                raise ValueError("the vector to be multiplied is not finite")
            raise ValueError(f"a product with the {self.kind} matrix is not finite, though the loss is: somewhere its "
                             "second derivative is infinite, as that of a norm at 0")  # fmt: skip
        return found

    @property
    def passes(self) -> float:
        """Cost of the objective so far, in gradients of the data."""
        return self.objective.passes

    def linear_operator(self) -> LinearOperator:
        """Return the matrix as SciPy's ``LinearOperator``, for ``scipy.sparse.linalg.eigsh`` and the like."""
        from scipy.sparse.linalg import LinearOperator

        def matvec(x: Any) -> Any:
            v = torch.as_tensor(x, dtype=self.dtype, device=self.device)
            return (self @ v.reshape(self.size, -1)).reshape(v.shape).cpu().numpy()

        kind = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator((self.size, self.size), matvec=matvec, matmat=matvec, rmatvec=matvec, dtype=kind)

    def release(self) -> None:
        """Forget the graphs that were kept."""
        self._kept, self._made_at, self._places = [], [], torch.empty(0)

    def _products(self, reuse: bool) -> Iterator[tuple[Product, Tensor, int]]:
        """Give each batch's product, the examples' weights and their number."""
        if self._kept and self._made_at == self._now():
            yield from self._kept
            return
        self.release()
        made_at, made = self._now() if reuse else [], []
        for i, batch in enumerate(self.objective.batches()):
            with once.in_words():
                one = self._make(batch, i)
            self.objective.count(1, one[2])
            if reuse:
                made.append(one)
            yield one
        self._kept, self._made_at = made, made_at

    def _make(self, batch: Any, index: int) -> tuple[Product, Tensor, int]:
        if self.kind == "hessian":
            return hessian(self.objective, batch)
        if self.kind == "ggn":
            return gauss_newton(self.objective, batch)
        if self.kind == "empirical":
            return empirical(self.objective, batch)
        generator = self.objective.generator(self._seed, f"labels {self.objective.rank} {index}")
        return fisher(self.objective, batch, self._likelihood, self._draws, generator)

    def _now(self) -> list[float]:
        """What tells whether a weight or a buffer has changed, by way of ``.data`` too, which bumps no version."""
        model = self.objective.model
        tensors = [t.detach() for t in (*model.parameters(), *model.buffers())]
        flat = torch.cat([t.reshape(-1).to(self.device, self.dtype) for t in tensors])
        if len(self._places) != len(flat):
            self._places = torch.arange(1, len(flat) + 1, dtype=self.dtype, device=self.device).sin_()
        return [float(flat @ self._places), *(number for t in tensors for number in (t._version, t.data_ptr()))]
