"""Hessians of nets with norms, attention and embeddings, against central differences of gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from exact import (
    dense,
    differences,
    gap,
    gauss_newton,
    losses,
    made,
    operator,
    outer,
    probes,
    uneven,
    untouched,
)
from steppe.curvature.objective import Objective
from steppe.curvature.operator import Operator

BATCHES = uneven(4)


class Attention(nn.Module):
    """torch's own scaled-dot-product attention, by the name that has fused kernels."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.head(out.transpose(1, 2).flatten(2).mean(1))


class Multihead(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Encoder(nn.Module):
    """A layer of torch's transformer, whose eval mode has a fast path without gradients."""

    def __init__(self, norm_first):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            4, 2, 5, dropout=0.1, activation="gelu", batch_first=True, norm_first=norm_first
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


class Tokens(nn.Module):
    """An embedding that is tied to the head."""

    def __init__(self, tied):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.mix(self.embed(x)).tanh().mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x):
        return self.net(x)[0][:, -1]


def convolutions(*norms):
    """Two convolutions, each before a norm of 2 channels."""
    return nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1, bias=False),
        norms[0],
        nn.GELU(),
        nn.Conv2d(2, 2, 3, stride=2, bias=False),
        norms[1],
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def instance_norm():
    return nn.InstanceNorm2d(2, affine=True, track_running_stats=True)


def dense_norm(norm):
    return nn.Sequential(nn.Linear(4, 5), norm, nn.Tanh(), nn.Linear(5, 3))


NETS = {
    "LayerNorm": (lambda: dense_norm(nn.LayerNorm(5)), (4,)),
    "LayerNorm without affine": (lambda: dense_norm(nn.LayerNorm(5, elementwise_affine=False)), (4,)),
    "RMSNorm": (lambda: dense_norm(nn.RMSNorm(5)), (4,)),
    "BatchNorm1d": (lambda: dense_norm(nn.BatchNorm1d(5)), (4,)),
    "GroupNorm": (lambda: convolutions(nn.GroupNorm(1, 2), nn.GroupNorm(2, 2)), (2, 5, 5)),
    "BatchNorm2d": (lambda: convolutions(nn.BatchNorm2d(2), nn.BatchNorm2d(2)), (2, 5, 5)),
    "InstanceNorm2d": (lambda: convolutions(instance_norm(), instance_norm()), (2, 5, 5)),
    "attention": (Attention, (3, 4)),
    "MultiheadAttention": (Multihead, (3, 4)),
    "TransformerEncoderLayer": (lambda: Encoder(False), (3, 4)),
    "TransformerEncoderLayer, norm first": (lambda: Encoder(True), (3, 4)),
    "LSTM": (Recurrent, (3, 4)),
    "Embedding": (lambda: Tokens(False), ()),
    "tied weights": (lambda: Tokens(True), ()),
}


def case(name):
    """A network whose statistics are not those it was born with, some layers in the other mode, and batches."""
    build, shape = NETS[name]
    model = made(build)
    if shape:
        batches = uneven(*shape, sizes=(4, 2))
    else:
        generator = torch.Generator().manual_seed(1)
        batches = [
            (torch.randint(6, (n, 3), generator=generator), torch.randint(6, (n,), generator=generator)) for n in (4, 2)
        ]
    with torch.no_grad():
        for x, _ in batches:
            model(x)
    next(module for module in model.modules() if not list(module.children())).eval()
    losses(model, batches[0]).sum().backward()
    return model, batches


@pytest.mark.parametrize("name", NETS)
def test_hessian_against_central_differences(name):
    model, batches = case(name)
    with untouched(model):
        A = operator(model, losses, batches)
        V = probes(A.size, 10)
        assert gap(A @ V, differences(model, losses, batches, V)) < 1e-6


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "InstanceNorm2d"])
def test_train_mode_normalises_by_the_batch(name):
    model, batches = case(name)
    with untouched(model):
        A = operator(model, losses, batches, mode="train")
        V = probes(A.size, 10)
        assert gap(A @ V, differences(model, losses, batches, V, "train")) < 1e-6
        assert gap(A @ V, operator(model, losses, batches) @ V) > 1e-2


@pytest.mark.parametrize("name", ["LayerNorm", "BatchNorm2d", "attention", "TransformerEncoderLayer", "tied weights"])
@pytest.mark.parametrize("kind", ["ggn", "empirical"])
def test_products_of_jacobians_on_layers_with_norms(name, kind):
    model, batches = case(name)
    with untouched(model):
        A = operator(model, losses, batches, kind)
        V = probes(A.size)
        found = A @ V
    model.eval()
    wanted = gauss_newton(model, batches, F.cross_entropy) if kind == "ggn" else outer(model, losses, batches)
    assert gap(found, wanted @ V) < 1e-12


def test_a_tied_weight_goes_by_either_name():
    model, batches = case("tied weights")
    by = [Objective(model, losses, batches, params=pattern) for pattern in (r"^embed", r"^head")]
    assert by[0].names == by[1].names == ["embed.weight"]
    assert torch.equal(dense(Operator(by[0])), dense(Operator(by[1])))


def test_spectral_norms_rest_in_train_mode():
    """A step of their power iteration in each pass would make another matrix of every product."""
    model = made(lambda: nn.Sequential(spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)))
    objective = Objective(model, losses, BATCHES, mode="train")
    with untouched(model), objective.still():
        A, V = Operator(objective), probes(43)
        assert torch.equal(A @ V, A @ V)
        assert torch.equal(A @ V, operator(model, losses, BATCHES) @ V)


def test_dropout_of_train_mode_has_the_same_masks_in_every_product():
    model = made(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)))
    objective = Objective(model, losses, BATCHES, mode="train")
    A = Operator(objective)
    with untouched(model):
        first = dense(A)
        with objective.still():
            assert torch.equal(dense(A), first)
            assert torch.equal(dense(A), first)
        assert gap(first, first.T) < 1e-13
        assert gap(dense(operator(model, losses, BATCHES)), first) > 1e-2
