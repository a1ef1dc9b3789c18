"""The eigenvalues at the ends of a symmetric matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from .. import checks
from .axes import given_or_new
from .lanczos import Lanczos
from .matrix import Matrix, first

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Which: TypeAlias = Literal["largest", "smallest", "magnitude"]
SIGNS = {"largest": (1,), "smallest": (-1,), "magnitude": (1, -1)}
"""The ends of the spectrum that are wanted."""
DOUBT = 0.01
"""Probability with which an eigenvalue may lie beyond the limit."""


@dataclass(frozen=True, eq=False)
class Eigenvalues:
    """The eigenvalues found, the wanted ones first, and how far they can be trusted."""

    values: Tensor
    """Shape (k,), float64 on the CPU, as what follows but the vectors."""
    bounds: Tensor
    """A has an eigenvalue at most so far from each value: ``‖A v − λ v‖`` and what rounding may add to it."""
    errors: Tensor
    """What the errors should be, often a hundredth of the bounds: ``bound²/gap``, after Temple and Kato.

    No bounds: the gap is that to the next value found, and two eigenvalues may have been taken for one.
    """
    limit: float
    """No eigenvalue of A lies beyond this, with a probability of 99 % over the random start.

    Where the magnitude was asked for, none in magnitude. For power iteration it is not known: infinite.
    """
    converged: Tensor
    """Whether each bound is at most ``tol·|value|``, and the limit at most ``√tol·|value|`` from the first value."""
    vectors: Tensor = field(repr=False)
    """Of unit length, shape (k, n), where the matrix lives."""
    products: int
    """Products with the matrix."""
    passes: float
    """Their cost in gradients of the data."""

    def ratio(self, k: int = 5) -> float:
        """Return ``λ₁/λ_k``.

        Raises:
            ValueError: if fewer than k eigenvalues were computed.
        """
        if not 1 <= k <= len(self.values):
            raise ValueError(f"ratio({k}) needs {k} eigenvalues, here are {len(self.values)}: call eigenvalues(k={k})")
        return float(self.values[0] / self.values[k - 1])

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the values with their bounds; those that did not converge are hollow."""
        axes = given_or_new(axes)
        places = torch.arange(1, len(self.values) + 1)
        for chosen, face in ((self.converged, "C0"), (~self.converged, "none")):
            if chosen.any():
                axes.errorbar(
                    places[chosen].numpy(),
                    self.values[chosen].numpy(),
                    yerr=self.bounds[chosen].numpy(),
                    fmt="o",
                    color="C0",
                    markerfacecolor=face,
                    label="converged" if face == "C0" else "not converged",
                )
        axes.set_xlabel("number")
        axes.set_ylabel("eigenvalue")
        axes.set_xticks(places.tolist())
        if not self.converged.all():
            axes.legend()
        return axes


def eigenvalues(
    A: Matrix,
    k: int = 1,
    which: Which = "largest",
    *,
    tol: float = 1e-3,
    max_products: int = 300,
    basis: int = 60,
    start: Tensor | None = None,
    seed: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> Eigenvalues:
    """Return the k eigenvalues at one end of a symmetric matrix, by the Lanczos process.

    After every product two things are known of the Ritz pairs θ, y. The residual norms ``‖A y − θ y‖``: so far away, at
    most, is an eigenvalue. And a limit beyond which there is none, since its eigenvector would have shown by now: a
    random start has a share in all of them. The process stops as soon as both are within the tolerance, never because
    the values seem to stand still: they do, for some products, at an eigenvalue that is not the largest. Of the second
    and further values there is no such limit; one close to another may be missed.

    Where the vectors so far span an invariant space before all wanted eigenvalues are in it, a new random vector goes
    on outside: there a multiple eigenvalue is found again, as often as it counts. (Where the process converges before
    that, it is counted once.) When the basis is full, the better half of its Ritz vectors is kept (thick restart).

    Args:
        A: symmetric matrix of n rows.
        k: how many.
        which: ``"largest"``, ``"smallest"`` (the most negative) or ``"magnitude"``; they come in this order.
        tol: bound wanted, relative to the value's magnitude; the limit has to be within its square root.
        max_products: when to give up; what has not converged by then says so.
        basis: most vectors of n entries to keep in memory, at least 2k + 10.
        start: vector (n,) to begin with, to which as much noise is added; noise alone by default, which is best. A
            gradient costs products: near a minimum it hardly contains the largest eigenvectors, and wherever it does,
            the limit comes closer later.
        seed: of the noise.
        progress: called with the share of ``max_products`` done, at the end with 1.

    Raises:
        ValueError: if k is more than n or max_products, an argument is out of range, or a product is not finite.

    Cost:
        The products it takes: for ``λmax`` of a network at ``tol=1e-2`` some 6 to 9 (``benchmarks/curvature.py``).

    Source:
        Lanczos 1950; Wu and Simon 2000 (thick restart); Parlett 1980, "The symmetric eigenvalue problem", theorem
        4.5.1 (the bound) and section 10.7 (the estimate); the limit: see `steppe.curvature.lanczos`.
    """
    checks.count(k=k, max_products=max_products, basis=basis)
    checks.non_negative(tol=tol)
    checks.one_of(which=(which, tuple(SIGNS)))
    if k > min(A.size, max_products):
        limits = f"a matrix of {A.size} rows" if k > A.size else f"max_products={max_products}"
        raise ValueError(f"k={k} eigenvalues of {limits}: ask for fewer")
    before, generator = A.passes, torch.Generator().manual_seed(seed)
    share = torch.pi / 2 * DOUBT**2 / A.size / (1 if start is None else 4)
    process = Lanczos(A, first(A, start, generator), min(A.size, max(basis, 2 * k + 10)))
    for products in range(1, max_products + 1):
        progress((products - 1) / max_products)
        process.step()
        values, residuals, coordinates = process.ritz()
        ranks = torch.stack([sign * values for sign in SIGNS[which]]).amax(0)
        order = ranks.argsort(descending=True)
        best, leader = order[:k], process.locked + int(ranks[process.locked :].argmax())
        bounds = residuals + process.rounding
        within = (bounds <= tol * values.abs()) | (residuals <= process.rounding)
        limit = max(process.limit(sign, share) for sign in SIGNS[which])
        distance = limit - float(ranks[leader])
        sure = distance <= max(tol**0.5 * float(values[leader].abs()), process.rounding)
        settled = bool(within[best].all() and within[leader]) and sure
        over = (settled and (process.rows >= k or process.exhausted)) or process.beta == 0
        complete = process.rows >= k and ranks[leader] <= ranks[best[-1]] + process.rounding
        closed = complete or process.rows == A.size or not (process.exhausted or process.locked)
        if products == max_products or (over and closed):
            break
        if over:
            process.keep(best, locked=len(best))
            process.begin(first(A, None, generator))
        elif process.rows == process.room:
            free = order[order >= process.locked]
            kept = torch.cat([torch.arange(process.locked), free[: (len(free) + k) // 2]])
            process.keep(kept, locked=process.locked)
    progress(1.0)
    return Eigenvalues(
        values=values[best],
        bounds=bounds[best],
        errors=_errors(values, bounds, process.rounding)[best],
        limit=(-1 if which == "smallest" else 1) * max(limit, float(ranks[best[0]])),
        converged=(bounds[best] <= tol * values[best].abs()) & sure,
        vectors=process.vectors(coordinates[:, best]),
        products=products,
        passes=A.passes - before,
    )


def _errors(values: Tensor, bounds: Tensor, rounding: float) -> Tensor:
    """Return ``bound²/gap`` where the gap to the others' intervals is larger than the bound, else the bound."""
    gaps = (values[:, None] - values[None, :]).abs() - bounds[None, :]
    gap = gaps.fill_diagonal_(torch.inf).amin(1)
    return torch.where(gap > bounds, (bounds**2 / gap).clamp_min(rounding), bounds)
