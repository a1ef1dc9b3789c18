"""Every operator is linear and symmetric, and a Fisher matrix positive, on random small networks and data."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from exact import gap, losses, made, operator, squares, uneven

ACTIVATIONS = nn.Tanh, nn.GELU, nn.SiLU, nn.ReLU, nn.Softplus
NORMS = nn.Identity, nn.LayerNorm, nn.BatchNorm1d, nn.RMSNorm
KINDS = {
    "hessian": {},
    "ggn": {},
    "fisher": {"likelihood": "categorical"},
    "fisher, drawn": {"likelihood": "categorical", "draws": 2},
    "fisher, gaussian": {"likelihood": "gaussian"},
    "empirical": {},
}


@st.composite
def problems(draw):
    """A network, batches, and how they are run."""
    widths = draw(st.lists(st.integers(2, 5), min_size=1, max_size=3))
    layers: list[nn.Module] = []
    for a, b in zip([3, *widths], widths, strict=False):
        layers += [nn.Linear(a, b), draw(st.sampled_from(NORMS))(b), draw(st.sampled_from(ACTIVATIONS))()]
    dropout = nn.Dropout(draw(st.sampled_from([0.0, 0.3])))
    seed = draw(st.integers(0, 1000))
    model = made(lambda: nn.Sequential(*layers, dropout, nn.Linear(widths[-1], draw(st.integers(1, 4)))))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for p in model.parameters():
            p.data.normal_()
    sizes = draw(st.lists(st.integers(2, 4), min_size=1, max_size=3))
    batches = uneven(3, classes=model[-1].out_features, sizes=sizes, seed=seed)
    loss_fn = losses
    if draw(st.booleans()):
        loss_fn, batches = squares, [(x, x[:, :1].sin()) for x, _ in batches]
    how = {"mode": draw(st.sampled_from(["eval", "train"])), "reuse": draw(st.sampled_from([None, True, False]))}
    if draw(st.booleans()):
        how["weights"] = lambda batch: 0.1 + batch[0][:, 0].square()
    return model, loss_fn, batches, how, seed


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(problem=problems(), a=st.floats(-3, 3))
def test_linear_and_symmetric(kind, problem, a):
    model, loss_fn, batches, how, seed = problem
    A = operator(model, loss_fn, batches, kind.split(",")[0], **how, **KINDS[kind])
    generator = torch.Generator().manual_seed(seed)
    u, v = torch.randn(2, A.size, dtype=torch.float64, generator=generator)
    Au, Av = A @ u, A @ v
    scale = float(Au.norm() * v.norm() + Av.norm() * u.norm()) + 1e-12
    assert abs(float(u @ Av - v @ Au)) < 1e-11 * scale
    torch.testing.assert_close(A @ (a * u + v), a * Au + Av, rtol=1e-9, atol=1e-11 * scale)
    assert not (A @ torch.zeros_like(u)).any()
    torch.testing.assert_close(A @ torch.stack([u, v], 1), torch.stack([Au, Av], 1), rtol=1e-9, atol=1e-11 * scale)
    if kind != "hessian":
        assert float(u @ Au) > -1e-11 * scale
    if float(Au.norm()) > 1e-9:
        assert gap(A @ u, Au) < 1e-12
