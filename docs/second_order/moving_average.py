"""AdaHessian with and without the moving average of the Hessian, where the curvature is noise.

    python docs/second_order/moving_average.py [--out docs/pictures]

After figure 3 of Yao et al. 2021: ``f(x) = x² + 0.1 x sin(20πx)``. The start and the learning rate are ours; the paper
does not state its own.
"""

from __future__ import annotations

from pathlib import Path

import torch
from drawing import figure, run
from torch import Tensor, nn

import steppe
from steppe.optim import AdaHessian

START, LR, NEAR = -1.0, 1.5, 0.02
RUNS = {"with": (0.999, 50), "without": (0.0, 1000)}
"""β₂ of the Hessian's average, and steps."""


def wavy(x: Tensor) -> Tensor:
    """Return f(x)."""
    return x * x + 0.1 * x * (20 * torch.pi * x).sin()


def path(beta2: float, steps: int) -> Tensor:
    """Return the places of a run, shape (steps + 1,)."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, START)
    opt = AdaHessian(model.parameters(), lr=LR, betas=(0.0, beta2))
    batch = steppe.Batch(model, lambda model, one: wavy(model(one)[:, 0]), torch.ones(1, 1, dtype=torch.float64))
    places = [START]
    for _ in range(steps):
        opt.step(batch)
        places.append(float(model.weight.detach()))
    return torch.tensor(places, dtype=torch.float64)


def main(out: Path) -> None:
    """Draw f and the paths, and print where they end."""
    x = torch.linspace(-1.1, 1.1, 4401, dtype=torch.float64)
    lowest = float(x[wavy(x).argmin()].abs())
    print(f"the two lowest points are at ±{lowest:.4f}, where f = {float(wavy(torch.tensor(lowest))):.5f}")
    drawn, (left, right) = figure(2)
    left.plot(x, wavy(x), color="0.7")
    for name, (beta2, steps) in RUNS.items():
        places = path(beta2, steps)
        far = (places.abs() - lowest).abs() > NEAR
        last = int(far.nonzero().max()) + 1
        end = f"within {NEAR} of a lowest point from step {last} on" if last <= steps else "at no lowest point"
        print(f"{name} the moving average: {end}; after {steps} steps x = {float(places[-1]):.4f}")
        left.plot(places, wavy(places), "o-", markersize=4, label=f"{name} the moving average", alpha=0.8)
        right.plot(places[:51].abs(), "o-", markersize=3, alpha=0.8)
    right.axhline(lowest, color="0.5", linestyle=":")
    left.set(xlabel="x", ylabel="f(x)", title="x² + 0.1 x sin(20πx)", xlim=(-1.05, 0.35), ylim=(-0.05, 1.1))
    right.set(xlabel="step", ylabel="|x|", title="the first 50 steps")
    left.legend(fontsize="small")
    drawn.savefig(out / "moving-average.png")


if __name__ == "__main__":
    run(main, __doc__)
