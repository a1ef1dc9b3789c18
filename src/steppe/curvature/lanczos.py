"""The Lanczos process with full re-orthogonalisation."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .matrix import Matrix, product, rounding, unit


class Lanczos:
    """An orthonormal basis of a Krylov space of a symmetric matrix, grown by one product at a time.

        A qⱼ = Σᵢ hᵢⱼ qᵢ + β qⱼ₊₁ ,    H = Q A Qᵀ

    New vectors are orthogonalised twice against all that are there, so that no eigenvalue comes up twice by rounding.
    All of the column h is kept, of which the three-term recurrence would keep two entries: after ``keep``, the
    others are not zero. The first ``locked`` vectors are eigenvectors found, and the process keeps away from them.

    Args:
        A: symmetric matrix of n rows.
        start: first vector, shape (n,).
        room: largest number of vectors in the basis, at most n.

    Raises:
        ValueError: in ``step``, if a product is not finite.

    Cost:
        A product a step; memory for at most ``room`` vectors, while it grows or is turned for half as many more.

    Source:
        Lanczos 1950, "An iteration method for the solution of the eigenvalue problem"; Parlett 1980, "The symmetric
        eigenvalue problem", chapter 13; thick restart: Wu and Simon 2000, "Thick-restart Lanczos method for large
        symmetric eigenvalue problems".
    """

    def __init__(self, A: Matrix, start: Tensor, room: int) -> None:
        self.A, self.room = A, room
        self.basis = torch.zeros(min(room, 8), A.size, dtype=A.dtype, device=A.device)
        self.H = torch.zeros(room, room, dtype=torch.float64)
        self.rows = self.locked = self.turns = 0
        self.beta = self.scale = 0.0
        self.held = torch.zeros(0, dtype=torch.float64)
        self.begin(start)

    @property
    def rounding(self) -> float:
        """What rounding may add to a residual; as much again for each time that the basis was turned."""
        return (1 + self.turns) * rounding(self.A, self.scale)

    @property
    def exhausted(self) -> bool:
        """Whether the basis spans an invariant space but for rounding, so that products of A lead out no more."""
        return self.beta <= 100 * self.rounding

    def begin(self, start: Tensor) -> None:
        """Go on from ``start``, less what the basis holds of it."""
        rest, _ = self._orthogonal(unit(start))
        self.next = unit(rest)
        self.dropped, self.log_norm = torch.zeros(0, dtype=torch.float64), 0.0

    def step(self) -> None:
        """Add the next vector to the basis."""
        image = product(self.A, self.next)
        self.scale = max(self.scale, float(torch.linalg.vector_norm(image)))
        if self.rows == len(self.basis):
            more = min(self.room, 2 * self.rows) - self.rows
            self.basis = torch.cat([self.basis, self.basis.new_zeros(more, self.A.size)])
        self.basis[self.rows] = self.next
        self.rows += 1
        rest, column = self._orthogonal(image)
        self.H[: self.rows, self.rows - 1] = self.H[self.rows - 1, : self.rows] = column.to("cpu", torch.float64)
        self.beta = float(torch.linalg.vector_norm(rest)) if self.rows < self.A.size else 0.0
        if self.beta > 0:
            self.next = rest / self.beta
            self.log_norm += math.log(self.beta)

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the basis knows of A's eigenvalues: (values, residual norms, coordinates), float64 on the CPU.

        The value ``θ`` and the unit vector ``y = Qᵀs``, s a column of the coordinates, have the residual norm
        ``‖A y − θ y‖ = β |s_last|``, and what leads back to locked vectors. Those come first; the others ascend.
        """
        values, s = self.H.diagonal()[: self.rows].clone(), torch.eye(self.rows, dtype=torch.float64)
        free = slice(self.locked, self.rows)
        values[free], s[free, free] = torch.linalg.eigh(self.H[free, free])
        out = torch.cat([self.H[: self.locked, free] @ s[free, free], self.beta * s[-1:, free]])
        return values, torch.cat([self.held, torch.linalg.vector_norm(out, dim=0)]), s

    def limit(self, sign: int, share: float) -> float:
        """Return the x beyond which lies no eigenvalue whose eigenvector has the given share in ``start``.

            p(x)² = 1/share ,    p(x) = Πᵢ (x − θᵢ) / Πⱼ βⱼ

        p is the orthonormal Lanczos polynomial, with the Ritz values for its roots, those of restarts included. Over
        the eigenvalues, weighted with the shares of their eigenvectors, its mean square is 1; and outside of its roots
        it grows without end. So an eigenvector that has a share, but has not shown, cannot be far out.

        Args:
            sign: 1 for the upper end; −1 for that of −A.
            share: squared length of the unit start's part along the eigenvector.

        Source:
            van Dorsselaer, Hochstenbach and van der Vorst 2000, "Computing probabilistic bounds for extreme eigenvalues
            of symmetric matrices with the Lanczos method".
        """
        values, _, _ = self.ritz()
        roots = sign * torch.cat([values[self.locked :], self.dropped]).numpy()
        top = float(roots.max())
        if self.beta == 0.0:
            return top
        goal = self.log_norm - math.log(share) / 2
        high = goal / len(roots)  # log of the distance from the top, if all roots lay there
        low = high - 80.0
        for _ in range(50):
            middle = (low + high) / 2
            if np.log(math.exp(middle) + (top - roots)).sum() > goal:
                high = middle
            else:
                low = middle
        return top + math.exp(high)

    def vectors(self, coordinates: Tensor) -> Tensor:
        """Return the vectors with these coordinates (rows, k), as rows (k, n)."""
        return coordinates.T.to(self.basis) @ self.basis[: self.rows]

    def keep(self, chosen: Tensor, locked: int) -> None:
        """Make the basis the Ritz vectors at these places of ``ritz``, the first ``locked`` of them locked."""
        values, residuals, s = self.ritz()
        others = torch.ones(self.rows, dtype=torch.bool)
        others[chosen] = False
        self.dropped = torch.cat([self.dropped, values[others]])
        count, free = len(chosen), slice(self.locked, self.rows)
        coupling = self.H[: self.locked, free] @ s[free, chosen[locked:]]
        self.basis[:count] = self.vectors(s[:, chosen])
        self.H.zero_().diagonal()[:count] = values[chosen]
        self.H[: len(coupling), locked:count] = coupling
        self.held, self.rows, self.locked = residuals[chosen[:locked]], count, locked
        self.turns += 1

    def _orthogonal(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``v`` less its part in the basis, and that part's coordinates."""
        Q = self.basis[: self.rows]
        first = Q @ v
        v = v - first @ Q
        second = Q @ v
        return v - second @ Q, first + second
