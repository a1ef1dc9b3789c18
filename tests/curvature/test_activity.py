"""Shares of active neurons, counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nets
from quadratics import normal
from steppe.curvature.activity import active_neurons
from steppe.curvature.objective import Objective
from steppe.lab.models.resnet import ResNet18


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).flatten(1).square().sum(1)


def weigh(x: Tensor) -> Tensor:
    return x[:, 0].abs()


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU(inplace=True), nn.GELU(), nn.SiLU(), nn.LeakyReLU(), nn.ELU()])
@pytest.mark.parametrize("weights", [None, weigh])
def test_a_layer_by_hand(act, weights):
    x, first = normal(7, 4), nn.Linear(4, 9).double()
    model = nn.Sequential(first, act, nn.Linear(9, 2).double())
    found = active_neurons(Objective(model, squares, [x[:5], x[5:]], weights=weights))
    a = torch.ones(7, dtype=torch.float64) if weights is None else weigh(x)
    each = (first(x) > 0).double().mean(1)
    assert found.shares == {"1": pytest.approx(float(a @ each / a.sum()), rel=1e-13)}
    assert found.neurons == {"1": 9}
    assert found.share == pytest.approx(found.shares["1"], rel=1e-14)
    assert found.passes == pytest.approx(1 / 3)


class Functions(nn.Module):
    """Activations of every spelling, one of them used twice; the sizes differ."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6).double(), nn.Linear(6, 6).double()
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.b(self.act(self.a(x))))
        x = torch.relu(-x) + x.relu() + F.relu(x - 0.1, inplace=True)
        return F.silu(input=x[:, :3])


def test_functions_are_seen_and_named_after_the_module_they_run_in():
    found = active_neurons(Objective(nn.Sequential(Functions()), squares, [normal(20, 4)]))
    assert list(found.shares) == ["0.act", "0.act#2", "0:relu", "0:relu#2", "0:relu#3", "0:silu"]
    assert list(found.neurons.values()) == [6, 6, 6, 6, 6, 3]
    share = sum(found.neurons[name] * found.shares[name] for name in found.shares) / 33
    assert found.share == pytest.approx(share, rel=1e-13)
    assert found.shares["0:silu"] > 0


def test_the_resnet_of_the_lab():
    model = ResNet18(width=4)
    y = torch.tensor([0, 1, 2])
    found = active_neurons(Objective(model, nets.losses, [(torch.randn(3, 3, 8, 8), y)]))
    assert len(found.shares) == 1 + 2 * 8
    assert list(found.shares)[:3] == [":relu", "blocks.0:relu", "blocks.0:relu#2"]
    assert found.neurons[":relu"] == 4 * 64
    assert all(0 < share <= 1 for share in found.shares.values())


def test_torchs_own_transformer_layer_does_not_take_its_fast_path():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu").double()
    found = active_neurons(Objective(layer, squares, [normal(3, 5, 8)]))
    assert found.neurons == {":gelu": 5 * 16}
    assert 0 < found.share < 1


def test_examples_along_another_dimension_count_alike():
    model = nn.Sequential(nn.Flatten(0, 1), nn.ReLU(), nn.Unflatten(0, (-1, 5)))
    found = active_neurons(Objective(nn.Sequential(nn.Linear(2, 2).double(), model), squares, [normal(3, 5, 2)]))
    assert found.neurons == {"1.1": 10}


def test_a_model_without_any_is_refused():
    with pytest.raises(ValueError, match="Linear runs none of the activations celu, elu, gelu"):
        active_neurons(Objective(nn.Linear(4, 2).double(), squares, [normal(3, 4)]))


class Moody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.a(x)) if len(x) > 2 else F.gelu(self.a(x))


def test_a_model_that_runs_others_in_each_batch_is_refused():
    with pytest.raises(ValueError, match="does not run the same activations for each batch"):
        active_neurons(Objective(Moody(), squares, [normal(3, 4), normal(2, 4)]))


def test_plot():
    pytest.importorskip("matplotlib").use("agg")
    axes = active_neurons(Objective(Functions(), squares, [normal(20, 4)])).plot()
    assert len(axes.lines[0].get_ydata()) == 6
