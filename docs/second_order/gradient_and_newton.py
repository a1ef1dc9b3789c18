"""Gradient descent, AdaHessian and Newton's method on a quadratic valley, along the axes and turned.

    python docs/second_order/gradient_and_newton.py [--out docs/pictures]

After figure 1 of Yao et al. 2021: ``f(x, y) = 10x² + y²`` from (1, 1). The second valley is the same, turned by 45°.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from drawing import figure, run
from torch import Tensor, nn

import steppe
from steppe.optim import AdaHessian, NewtonCG

START, NEAR, MOST = (1.0, 1.0), 1e-6, 1000
VALLEY = torch.diag(torch.tensor([20.0, 2.0], dtype=torch.float64))
TURN = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64) / math.sqrt(2)
VALLEYS = {"10x² + y²": VALLEY, "the same, turned by 45°": TURN @ VALLEY @ TURN.T}
METHODS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "gradient descent": lambda w: torch.optim.SGD(w, lr=1 / 11),  # 2/(20 + 2), the best there is
    "AdaHessian": lambda w: AdaHessian(w, lr=1.0, betas=(0.0, 0.999), eps=1e-12, probes=16),
    "NewtonCG": lambda w: NewtonCG(w, damping=1e-12, tolerance=0.0),
}


class Point(nn.Module):
    """A point; its value for an example is where it is."""

    def __init__(self, start: tuple[float, float]) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Return the place for each of the examples."""
        return self.place.expand(len(x), -1)


def path(matrix: Tensor, method: str, start: tuple[float, float]) -> Tensor:
    """Return the places of a run, shape (steps + 1, 2), until it is near the minimum."""
    model = Point(start)
    opt = METHODS[method](list(model.parameters()))
    batch = steppe.Batch(model, lambda model, x: ((z := model(x)) @ matrix * z).sum(1) / 2, torch.zeros(1, 1))
    places = [model.place.detach().clone()]
    while float(places[-1].norm()) > NEAR and len(places) <= MOST:
        if isinstance(opt, torch.optim.SGD):
            opt.zero_grad()
            batch.backward(None)
            opt.step()
        else:
            opt.step(batch)
        places.append(model.place.detach().clone())
    return torch.stack(places)


def main(out: Path) -> None:
    """Draw the paths, and print how many steps they take."""
    drawn, panes = figure(2)
    grid = torch.linspace(-1.5, 1.5, 201, dtype=torch.float64)
    for axes, (title, matrix) in zip(panes, VALLEYS.items(), strict=True):
        w = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), dim=-1)
        axes.contour(grid, grid, (w @ matrix * w).sum(2) / 2, levels=[0.03, 0.3, 1, 3, 6, 11], colors="0.8")
        start = START if matrix is VALLEY else tuple((TURN @ torch.tensor(START, dtype=torch.float64)).tolist())
        for method, style in zip(METHODS, ("o-", "s-", "D--"), strict=True):
            places = path(matrix, method, start)
            axes.plot(*places.T, style, markersize=4, label=f"{method}: {len(places) - 1}", alpha=0.8)
            print(f"{title}, {method}: steps to within {NEAR:g} of the minimum: {len(places) - 1}")
        axes.set(title=title, aspect="equal", xlabel="x", ylabel="y", xlim=(-1.5, 1.5), ylim=(-1.5, 1.5))
        axes.legend(title="steps", fontsize="small", loc="lower left")
    drawn.savefig(out / "gradient-and-newton.png")


if __name__ == "__main__":
    run(main, __doc__)
