"""Operators beside curvlinops 3.0.1, on nets without LayerNorm: there its forward-over-reverse products are wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from exact import dense, gap, losses, made, operator, uneven

curvlinops = pytest.importorskip("curvlinops")

NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "convnet": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.GELU(), nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 3)
        ),
        (2, 5, 5),
    ),
}
THEIRS = {
    "hessian": curvlinops.HessianLinearOperator,
    "ggn": curvlinops.GGNLinearOperator,
    "empirical": curvlinops.EFLinearOperator,
}


def theirs(kind: str, model: nn.Module, params: list, batches: list) -> torch.Tensor:
    found = THEIRS[kind](model, nn.CrossEntropyLoss(), params, batches, check_deterministic=False)
    return found @ torch.eye(sum(p.numel() for p in params), dtype=torch.float64)


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("name", NETS)
def test_whole_matrices_and_blocks(name, kind):
    build, shape = NETS[name]
    model, batches = made(build).eval(), uneven(*shape)
    params = list(model.parameters())
    whole = dense(operator(model, losses, batches, kind))
    assert gap(whole, theirs(kind, model, params, batches)) < 1e-6
    for module in model:
        part = list(module.parameters())
        if part:
            mine = dense(operator(model, losses, batches, kind, params=module))
            assert gap(mine, theirs(kind, model, part, batches)) < 1e-6


def test_fisher():
    """Their Monte-Carlo matrix is within its spread of the exact one, which is their Gauss-Newton matrix."""
    build, shape = NETS["mlp"]
    model, batches = made(build), uneven(*shape)
    params, v = list(model.parameters()), torch.ones(43, dtype=torch.float64)
    exact = dense(operator(model, losses, batches, "fisher"))
    assert gap(exact, theirs("ggn", model, params, batches)) < 1e-6
    drawn = torch.stack([
        curvlinops.FisherMCLinearOperator(
            model, nn.CrossEntropyLoss(), params, batches, check_deterministic=False, seed=seed, mc_samples=4
        ) @ v
        for seed in range(60)
    ])  # fmt: skip
    z = (drawn.mean(0) - exact @ v) / (drawn.std(0) / 60**0.5)
    assert float(z.square().mean()) < 2
