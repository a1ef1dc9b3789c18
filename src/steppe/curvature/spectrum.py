"""The density of a symmetric matrix's eigenvalues."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import checks
from .axes import given_or_new
from .lanczos import Lanczos
from .matrix import Matrix, signs

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Quadrature of the spectral density ``(1/n) Σᵢ δ(x − λᵢ)``: each draw estimates it by points with weights."""

    nodes: Tensor
    """Shape (draws, steps), float64 on the CPU, ascending."""
    weights: Tensor
    """Shape (draws, steps): each draw's sum to 1. A draw that needed fewer steps has points of weight 0."""
    passes: float
    """Cost in gradients of the data."""

    def moment(self, p: int) -> tuple[float, float]:
        """Return ``tr(Aᵖ)/n`` and its standard error over the draws, nan for a single one."""
        mean, error = _over_draws((self.weights * self.nodes**p).sum(1))
        return float(mean), float(error)

    def density(self, grid: Tensor, width: float | None = None) -> tuple[Tensor, Tensor]:
        """Return the density with each point spread into a Gaussian, and its standard error over the draws.

        Args:
            grid: where, shape (points,).
            width: standard deviation of the Gaussian; 1/100 of the nodes' range by default.
        """
        width = self._width() if width is None else width
        checks.positive(width=width)
        z = (grid.to(self.nodes)[:, None, None] - self.nodes) / width
        found = (self.weights * (-(z**2) / 2).exp()).sum(2) / (width * (2 * torch.pi) ** 0.5)
        return _over_draws(found)

    def plot(self, axes: Axes | None = None, *, width: float | None = None, label: str | None = None) -> Axes:
        """Draw the density on a logarithmic scale, with its standard error."""
        axes = given_or_new(axes)
        width = self._width() if width is None else width
        low, high = float(self.nodes.min()) - 5 * width, float(self.nodes.max()) + 5 * width
        grid = torch.linspace(low, high, 1000, dtype=torch.float64)
        value, error = self.density(grid, width)
        (line,) = axes.plot(grid.numpy(), value.numpy(), label=label, linewidth=1.2)
        if len(self.nodes) > 1:
            floor = (value - error).clamp_min(1e-30)
            axes.fill_between(grid.numpy(), floor.numpy(), (value + error).numpy(), color=line.get_color(), alpha=0.2)
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(axes.get_ylim()[0], 1e-8 * float(value.max())))
        axes.set_xlabel("eigenvalue")
        axes.set_ylabel("density")
        if label is not None:
            axes.legend()
        return axes

    def _width(self) -> float:
        return float(self.nodes.max() - self.nodes.min()) / 100 or 1.0


def _over_draws(found: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean over the last dimension and its standard error, nan for a single draw."""
    draws = found.shape[-1]
    spread = found.std(-1) if draws > 1 else torch.full_like(found[..., 0], torch.nan)
    return found.mean(-1), spread / draws**0.5


def spectrum(
    A: Matrix,
    steps: int = 80,
    draws: int = 10,
    *,
    seed: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> Spectrum:
    """Return the density of a symmetric matrix's eigenvalues, by stochastic Lanczos quadrature.

        vᵀ f(A) v / vᵀv = Σⱼ τⱼ² f(θⱼ) ,    E_v = tr f(A) / n ,    θⱼ, τⱼ Ritz values and first coordinates

    Each draw runs the Lanczos process from a Rademacher vector. Its moments are exact for that vector up to order
    ``2·steps − 1``. What is smoother than the distance of the nodes can be believed; single eigenvalues only at the
    ends.

    Args:
        A: symmetric matrix of n rows.
        steps: Lanczos steps, and so nodes, of a draw.
        draws: vectors.
        seed: of the vectors.
        progress: called with the share done.

    Raises:
        ValueError: if an argument is out of range, or a product is not finite.

    Cost:
        ``steps·draws`` products; memory for ``steps`` vectors.

    Source:
        Ghorbani, Krishnan and Xiao 2019, "An investigation into neural net optimization via Hessian eigenvalue
        density", algorithm 2; Lin, Saad and Yang 2016, "Approximating spectral densities of large matrices".
    """
    checks.count(steps=steps, draws=draws)
    before, generator = A.passes, torch.Generator().manual_seed(seed)
    steps = min(steps, A.size)
    nodes, weights = torch.zeros(draws, steps, dtype=torch.float64), torch.zeros(draws, steps, dtype=torch.float64)
    for draw in range(draws):
        process = Lanczos(A, signs(A, generator, 1)[:, 0], steps)
        for step in range(steps):
            progress((draw + step / steps) / draws)
            process.step()
            if process.beta <= process.rounding:
                break
        values, _, coordinates = process.ritz()
        nodes[draw] = values[-1]
        nodes[draw, : len(values)], weights[draw, : len(values)] = values, coordinates[0] ** 2
    progress(1.0)
    return Spectrum(nodes, weights, A.passes - before)
