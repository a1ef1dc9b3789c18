"""The Fisher matrix and the empirical one, and the natural gradient as steepest descent under the KL divergence.

    python docs/second_order/fisher.py [--out docs/pictures]

Left, the example of Martens 2020, section 11.1: one weight θ, y ~ N(θ, 1), the one observation y = 0, so that the loss
is θ²/2, F = 1, and the empirical Fisher matrix is θ². Right, a logistic regression with two weights on inputs of
unequal scales: the ball of all models within a KL divergence of the present one, and the best of them.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from drawing import figure, run
from torch import Tensor, nn

import steppe
from steppe.curvature import Objective, Operator
from steppe.optim import NaturalGradient

STEPS, TINY = 40, 1e-12
RATES, EMPIRICAL = (0.3, 0.6, 1.2), 0.2
"""Learning rates."""
BALLS = (0.01, 0.0001)
"""Radii, in nats; the first is drawn."""


def example(fisher: str, lr: float) -> Tensor:
    """Return |θ| at each step of Martens' example, from θ = 1."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    opt = NaturalGradient(
        model.parameters(),
        lr,
        fisher=fisher,
        likelihood="gaussian",
        damping=TINY,
        momentum=0.0,
        decay=0.0,
        n=1,
        kl=None,
    )
    one = torch.ones(1, 1, dtype=torch.float64)
    batch = steppe.Batch(model, lambda model, x: model(x)[:, 0].square() / 2, one)
    far = [1.0]
    for _ in range(STEPS):
        opt.step(batch)
        far.append(abs(float(model.weight.detach())))
    return torch.tensor(far, dtype=torch.float64)


def regression() -> tuple[nn.Module, Tensor, Tensor]:
    """Return a logistic regression with two weights, its inputs and labels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 2, dtype=torch.float64, generator=generator) @ torch.tensor([[2.0, 0.3], [0.0, 0.4]]).double()
    model = Logistic()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([0.5, -0.5]))
    y = (torch.rand(100, dtype=torch.float64, generator=generator) < (1.0 * x[:, 0] + 2.0 * x[:, 1]).sigmoid()).long()
    return model, x, y


class Logistic(nn.Module):
    """Two classes with the logits 0 and ``wᵀx``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, shape (B, 2)."""
        z = x @ self.weight
        return torch.stack([torch.zeros_like(z), z], 1)


def at(x: Tensor, w: Tensor) -> Tensor:
    """Return log-probabilities of both classes at weights w of shape (..., 2)."""
    z = w @ x.T
    return torch.stack([F.logsigmoid(-z), F.logsigmoid(z)], -1)


def divergence(x: Tensor, w: Tensor, d: Tensor) -> Tensor:
    """Return ``KL(p_w ‖ p_{w+d})``, the mean over the inputs, in nats."""
    p, q = at(x, w), at(x, w + d)
    return (p.exp() * (p - q)).sum(-1).mean(-1)


def ball(x: Tensor, w: Tensor, radius: float) -> Tensor:
    """Return points all around the ball's surface, by bisection."""
    angles = torch.linspace(0, 2 * math.pi, 1801, dtype=torch.float64)
    unit = torch.stack([angles.cos(), angles.sin()], 1)
    low, high = torch.zeros_like(angles), torch.full_like(angles, 20.0)
    for _ in range(40):
        middle = (low + high) / 2
        inside = divergence(x, w, middle[:, None] * unit) < radius
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return low[:, None] * unit


def degrees(u: Tensor, v: Tensor) -> float:
    """Return the angle between two vectors."""
    return math.degrees(math.acos(min(1.0, float(u @ v / u.norm() / v.norm()))))


def main(out: Path) -> None:
    """Draw the rates and the ball, and print both."""
    drawn, (left, right) = figure(2)
    for lr in RATES:
        far = example("exact", lr)
        rate = float((far[8] / far[0]) ** (1 / 8))
        print(f"natural gradient, α = {lr}: |θ| falls by {rate:.6f} a step; |1 − α| is {abs(1 - lr):.6f}")
        left.semilogy(far.clamp(min=1e-16), "o-", markersize=3, label=f"F, α = {lr}")
    far = example("empirical", EMPIRICAL)
    print(f"empirical Fisher, α = {EMPIRICAL}: |θ| stays between {float(far.min()):.3f} and {float(far.max()):.3f}")
    left.semilogy(far, "k^--", markersize=4, label=f"empirical, α = {EMPIRICAL}")
    left.set(xlabel="step", ylabel="|θ|", title="Martens' example", ylim=(1e-12, 100))
    left.legend(fontsize="small")

    model, x, y = regression()

    def loss_fn(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(data[0]), data[1], reduction="none")

    w = model.weight.detach().clone()
    objective = Objective(model, loss_fn, [(x, y)])
    g, matrix = objective.gradient(), Operator(objective, "fisher") @ torch.eye(2, dtype=torch.float64)
    opt = NaturalGradient(model.parameters(), lr=1e3, fisher="exact", damping=TINY, momentum=0.0, kl=BALLS[0])
    opt.step(steppe.Batch(model, loss_fn, (x, y)))
    step = model.weight.detach() - w

    print(f"trust region of {BALLS[0]} nats: ½dᵀFd of the step is {float(step @ matrix @ step / 2):.5f}, "
          f"and its KL {float(divergence(x, w, step)):.5f}")  # fmt: skip
    for radius in reversed(BALLS):
        surface = ball(x, w, radius)
        heights = -at(x, w + surface)[:, torch.arange(len(y)), y].mean(1)
        best = surface[heights.argmin()]
        print(f"the best model within {radius} nats lies {degrees(step, best):.2f}° from −F⁻¹g, "
              f"and {degrees(-g, best):.2f}° from −g")  # fmt: skip

    spread = torch.linspace(-1, 1, 81, dtype=torch.float64)
    mesh = torch.stack(torch.meshgrid(spread, spread, indexing="xy"), -1) + w
    picture = -at(x, mesh)[..., torch.arange(len(y)), y].mean(-1)
    right.contour(spread + w[0], spread + w[1], picture, levels=25, colors="0.85")
    right.plot(*(w + surface).T, "C0", label=f"KL = {BALLS[0]}")
    values, vectors = torch.linalg.eigh(matrix)
    turn = torch.linspace(0, 2 * math.pi, 200, dtype=torch.float64)
    ellipse = (torch.stack([turn.cos(), turn.sin()], 1) * (2 * BALLS[0] / values).sqrt()) @ vectors.T
    right.plot(*(w + ellipse).T, "C0:", label=f"½ dᵀFd = {BALLS[0]}")
    for name, d, colour in (("−F⁻¹g", step, "C1"), ("−g", -g / g.norm() * step.norm() / 2, "C2")):
        right.annotate("", w + d, w, arrowprops={"color": colour, "width": 1, "headwidth": 6})
        right.plot([], [], colour, label=name)
    right.plot(*(w + best), "k*", label="best of the ball")
    right.set(xlabel="w₁", ylabel="w₂", title="Steepest descent in the KL ball")
    right.legend(fontsize="small")
    drawn.savefig(out / "fisher.png")


if __name__ == "__main__":
    run(main, __doc__)
