"""What the natural gradient is for: Martens' example, invariance, steepest descent where distance is divergence."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import nets
import steppe
from reference.natural import dense_fisher, flat, scores
from steppe.optim import NaturalGradient


class Constant(nn.Module):
    """f(x) = θ."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([theta], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.theta.expand(len(x), 1)


def half_square(model, batch):
    return 0.5 * ((model(batch[0]) - batch[1]) ** 2).sum(1)


def martens(fisher: str, alpha: float, steps: int, damping: float = 1e-12) -> list[float]:
    """The path of θ from 1 on the one example (0, 0) with y ~ N(θ, 1)."""
    model, data = Constant(1.0), (torch.zeros(1, 1).double(), torch.zeros(1, 1).double())
    opt = NaturalGradient(
        model.parameters(),
        alpha,
        fisher=fisher,
        likelihood="gaussian",
        damping=damping,
        momentum=0.0,
        decay=0.0,
        n=1,
        kl=None,
    )
    path = [1.0]
    for _ in range(steps):
        opt.step(steppe.Batch(model, half_square, data))
        path.append(float(model.theta.detach()))
    return path


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9, 1.3, 1.9])
def test_martens_example_converges_linearly(alpha):
    path = martens("exact", alpha, 30)
    for k, theta in enumerate(path):
        assert abs(abs(theta) - abs(1 - alpha) ** k) < 1e-9


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.5, 0.9, 1.3])
def test_the_empirical_fisher_does_not_converge_with_a_fixed_step(alpha):
    """θ ← (1 − α/θ²) θ: a step of α/|θ|, which grows as θ falls."""
    path = martens("empirical", alpha, 150)
    for theta, after in pairwise(path):
        if abs(theta) > 1e-3:  # where the damping is nothing beside θ²
            assert math.isclose(after, theta - alpha / theta, rel_tol=1e-5)
    assert max(abs(theta) for theta in path[-50:]) > 0.5 * math.sqrt(alpha)


class Mixed(nn.Module):
    """A network whose weights are ``θ = M φ``, of which φ is trained."""

    def __init__(self, theta: Tensor, M: Tensor) -> None:
        super().__init__()
        self.M = M
        self.phi = nn.Parameter(torch.linalg.solve(M, theta))

    def forward(self, x: Tensor) -> Tensor:
        theta = self.M @ self.phi
        W, V = theta[:6].view(2, 3), theta[6:].view(3, 2)
        return torch.tanh(x @ W.T) @ V.T


def paths(make) -> float:
    """The largest difference between the outputs of two parameterisations along 20 steps."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theta = torch.tensor([1.0, -0.5, 0.2, 0.3, 0.8, -1.0, 1.0, 0.2, -0.6, 0.7, 0.1, 1.2], dtype=torch.float64)
        M = torch.eye(12, dtype=torch.float64) + 0.3 * torch.randn(12, 12, dtype=torch.float64)
        x = torch.randn(40, 3, dtype=torch.float64)
        with torch.no_grad():  # what another such network says: a fit that leaves the Fisher matrix far from singular
            y = (
                Mixed(theta + 0.3 * torch.randn(12).double(), torch.eye(12).double())(x)
                + 0.1 * torch.randn(40, 3).double()
            )
    models = [Mixed(theta, torch.eye(12, dtype=torch.float64)), Mixed(theta, M)]
    assert torch.linalg.cond(M) > 5
    optimizers = [make(list(model.parameters())) for model in models]
    worst = 0.0
    for _ in range(20):
        for model, opt in zip(models, optimizers, strict=True):
            batch = steppe.Batch(model, half_square, (x, y))
            if isinstance(opt, NaturalGradient):
                opt.step(batch)
            else:
                opt.zero_grad()
                batch.backward(None)
                opt.step()
        with torch.no_grad():
            worst = max(worst, float((models[0](x) - models[1](x)).abs().max()))
    return worst


@pytest.mark.parametrize("kl", [None, 1e-3])
def test_the_path_in_function_space_does_not_depend_on_the_parameters(kl):
    how = {"fisher": "exact", "likelihood": "gaussian", "damping": 1e-13, "n": 1, "momentum": 0.0, "decay": 0.0}
    assert paths(lambda params: NaturalGradient(params, 0.1, kl=kl, **how)) < 1e-8


def test_that_of_gradient_descent_does():
    assert paths(lambda params: torch.optim.SGD(params, 0.1)) > 1e-2


class Two(nn.Module):
    """Logits of two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, -0.5], dtype=torch.float64))
        self.scale = torch.tensor([[1.0, 0.0], [0.4, 3.0], [-1.0, 1.0]], dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.scale * self.w).T


@pytest.mark.parametrize("radius", [1e-3, 1e-5])
def test_steepest_descent_under_divergence(radius):
    """−F⁻¹g/‖g‖_{F⁻¹} is the argmin of the loss on the ball KL ≤ ½ε², by brute force over its edge."""
    model = Two()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        x, y = torch.randn(30, 2, dtype=torch.float64), torch.randint(3, (30,))
    start = model.w.detach().clone()
    before = model(x).detach().log_softmax(1)

    def divergence(d: Tensor) -> Tensor:
        z = (x @ (model.scale * (start + d)).T).log_softmax(1)
        return (before.exp() * (before - z)).sum(1).mean()

    def loss(d: Tensor) -> Tensor:
        return nn.functional.cross_entropy(x @ (model.scale * (start + d)).T, y)

    best, where = math.inf, torch.zeros(2)
    for angle in torch.linspace(0, 2 * math.pi, 4001, dtype=torch.float64)[:-1]:
        way = torch.stack([angle.cos(), angle.sin()])
        length = radius / (2 * divergence(1e-4 * way) / 1e-8).sqrt()  # then KL = ½ radius², to first order exactly
        length = length * (0.5 * radius**2 / divergence(length * way)).sqrt()
        if float(loss(length * way)) < best:
            best, where = float(loss(length * way)), length * way

    opt = NaturalGradient(
        model.parameters(), 1e6, fisher="exact", damping=1e-12, momentum=0.0, decay=0.0, n=1, kl=0.5 * radius**2
    )
    opt.step(steppe.Batch(model, nets.losses, (x, y)))
    step = model.w.detach() - start
    assert float((step - where).norm() / where.norm()) < 5e-3  # of the angles tried, 1.6e-3 lie between two
    assert math.isclose(float(divergence(step)), 0.5 * radius**2, rel_tol=max(10 * radius, 1e-3))

    model.w.data.copy_(start)
    F = dense_fisher([model.w], scores(model, x, "categorical"))
    (g,) = torch.autograd.grad(nets.losses(model, (x, y)).mean(), [model.w])
    natural = torch.linalg.solve(F, g)
    torch.testing.assert_close(step, -radius * natural / (g @ natural).sqrt(), rtol=1e-8, atol=0)


def test_the_trust_region_holds():
    model, data = nets.mlp()
    opt = NaturalGradient(model.parameters(), 5.0, fisher="exact", damping=1e-2, decay=0.0, n=1, kl=1e-3)
    touched = 0
    for _ in range(10):
        params = list(model.parameters())
        F = dense_fisher(params, scores(model, data[0], "categorical"))
        before = flat(params).detach()
        opt.step(steppe.Batch(model, nets.losses, data))
        u = before - flat(params).detach()
        size = 0.5 * float(u @ F @ u)
        assert size <= 1e-3 * (1 + 1e-9)
        touched += size > 0.999e-3
    assert touched >= 5
