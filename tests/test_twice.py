"""The short way to second derivatives is the long way's result."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import nets
import steppe
from steppe.products import hessian_product
from steppe.twice import Twice

CASES = {
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 6, 5)),
    "conv2d without bias": (lambda: nn.Conv2d(3, 4, 3, bias=False), (2, 3, 6, 5)),
    "strides, dilation, groups": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2), groups=2), (2, 4, 7, 6)),
    "same padding": (lambda: nn.Conv2d(3, 4, 3, padding="same"), (2, 3, 6, 5)),
    "circular padding": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 6, 5)),
    "one image without batch": (lambda: nn.Conv2d(3, 4, 3), (3, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 3, 3)),
    "batch norm": (lambda: nn.BatchNorm2d(3), (4, 3, 3, 2)),
    "batch norm of vectors": (lambda: nn.BatchNorm1d(3), (6, 3)),
    "batch norm without weights": (lambda: nn.BatchNorm2d(3, affine=False), (4, 3, 3, 2)),
    "batch norm without statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (4, 3, 3, 2)),
    "batch norm by statistics": (lambda: nn.BatchNorm2d(3).eval(), (4, 3, 3, 2)),
    "batch norm by statistics, without weights": (lambda: nn.BatchNorm2d(3, affine=False).eval(), (4, 3, 3, 2)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (3, 4, 5)),
}


def made(name: str, layout=torch.contiguous_format):
    torch.manual_seed(0)
    layer, shape = CASES[name][0]().double(), CASES[name][1]
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    x = torch.randn(shape, dtype=torch.float64)
    if len(shape) == 4:
        x = x.contiguous(memory_format=layout)
    return layer, x.requires_grad_()


def derivatives(layer, x, wanted, short: bool):
    """Value, gradients, and their derivatives along random vectors, by the tensors wanted."""
    draw = torch.Generator().manual_seed(1)
    if short:
        with Twice():
            y = layer(x)
    else:
        y = layer(x)
    noise = torch.randn(y.shape, dtype=torch.float64, generator=draw).to(y.dtype).requires_grad_()
    first = torch.autograd.grad((noise * y.sin()).sum(), wanted, create_graph=True, allow_unused=True)
    roots = [g for g in first if g is not None and g.requires_grad]
    along = [torch.randn(g.shape, dtype=torch.float64, generator=draw).to(g.dtype) for g in roots]
    second = torch.autograd.grad(roots, [*wanted, noise], along, allow_unused=True)
    return y, first, second


def close(short, long):
    for a, b in zip(short, long, strict=True):
        if a is None or b is None:
            assert a is None or not a.any()
            assert b is None or not b.any()
        else:
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CASES)
def test_values_and_two_derivatives_are_those_of_torch(name, layout):
    layer, x = made(name, layout)
    tensors = [x, *layer.parameters()]
    for count in range(1, len(tensors) + 1):
        for wanted in itertools.combinations(tensors, count):
            for t in tensors:
                t.requires_grad_(any(t is w for w in wanted))
            (y1, first1, second1), (y2, first2, second2) = (
                derivatives(layer, x, wanted, short) for short in (True, False)
            )
            close([y1], [y2])
            close(first1, first2)
            close(second1, second2)


@pytest.mark.parametrize("name", [name for name in CASES if "batch norm" in name])
def test_running_statistics_move_as_ever(name):
    one, x = made(name)
    two, _ = made(name)
    with Twice():
        one(x)
    two(x)
    close(one.buffers(), two.buffers())


def third(layer, x, short: bool):
    """The third derivative of a scalar function of the layer along ones."""
    with Twice() if short else nullcontext():
        y = layer(x)
    (first,) = torch.autograd.grad(y.sin().sum(), [x], create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), [x], create_graph=True)
    return torch.autograd.grad(second.square().sum(), [x, *layer.parameters()])


@pytest.mark.parametrize("name", ["conv2d", "batch norm by statistics"])
def test_third_derivatives_are_right(name):
    layer, x = made(name)
    close(third(layer, x, True), third(layer, x, False))


def test_third_derivatives_of_batch_norm_are_refused_rather_than_wrong():
    layer, x = made("batch norm")
    with pytest.raises(RuntimeError, match="no third derivative"):
        third(layer, x, True)


def test_without_gradients_and_outside_nothing_is_replaced():
    layer, x = made("conv2d")
    with Twice(), torch.no_grad():
        assert layer(x).grad_fn is None
    assert "Convolution" in layer(x).grad_fn.name()
    with Twice():
        assert "_Convolution" in layer(x).grad_fn.name()
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.float()(x.float()).dtype == torch.bfloat16


def test_float32_is_as_exact_as_torch():
    layer, x = made("batch norm")
    exact = derivatives(layer, x, [x, *layer.parameters()], False)[2]
    layer, x = layer.float(), x.detach().float().requires_grad_()
    for short in (True, False):
        for a, b in zip(derivatives(layer, x, [x, *layer.parameters()], short)[2], exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_functions_with_keywords():
    x, w = torch.randn(2, 3, 5, 5, requires_grad=True), torch.randn(4, 3, 3, 3)
    with Twice():
        torch.testing.assert_close(F.conv2d(x, weight=w, padding=1), F.conv2d(x, w, None, 1, 1))


class Kernels(TorchDispatchMode):
    """The largest kernel that any convolution inside runs with."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in func.__name__ and "backward" not in func.__name__:
            self.largest = max(self.largest, *args[1].shape[2:])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("how", ["a step's", "a measurement's"])
def test_products_go_the_short_way(how):
    """Torch's double backward runs convolutions whose kernels are the image."""
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1), nn.AdaptiveAvgPool2d(1)
    model, data = nn.Sequential(*layers, nn.Flatten()).double(), nets.data(2, 9, 9)
    params = list(model.parameters())
    with Kernels() as kernels:
        if how == "a step's":
            hessian_product(steppe.Batch(model, nets.losses, data), params, [torch.ones_like(p) for p in params])
        else:
            objective = steppe.curvature.Objective(model, nets.losses, [data])
            steppe.curvature.Operator(objective) @ torch.ones(objective.size, dtype=torch.float64)
    assert kernels.largest == 3


@pytest.mark.parametrize("training", [True, False])
def test_a_checkpointed_layer_is_left_to_torch(training):
    """Activation checkpointing runs it again outside, and looks for the same saved tensors."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)).double()
    layers.train(training)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            return self.layers[3:](checkpoint(self.layers[:3], x, use_reentrant=False))

    x, y = torch.randn(5, 2, 6, 6, dtype=torch.float64), torch.randint(3, (5,))
    params = list(layers.parameters())
    v = [torch.randn_like(p) for p in params]
    one, two = (hessian_product(steppe.Batch(m, nets.losses, (x, y)), params, v) for m in (layers, Checkpointed()))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
