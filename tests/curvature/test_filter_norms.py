"""Norms of filters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import nets
from steppe.curvature.filters import filter_norms
from steppe.curvature.objective import Objective


def test_norms_of_every_layer():
    model, batch = nets.convnet()
    found = filter_norms(Objective(model, nets.losses, [batch]))
    assert list(found.norms) == ["0.weight", "3.weight", "8.weight"]
    for name, norms in found.norms.items():
        w = model.get_parameter(name)
        assert norms.tolist() == pytest.approx([each.norm().item() for each in w], rel=1e-14)
    assert found.every.tolist() == [norm for norms in found.norms.values() for norm in norms.tolist()]


def test_quantiles_are_numpys():
    model, batch = nets.convnet()
    found = filter_norms(Objective(model, nets.losses, [batch]))
    q = (0.0, 0.05, 0.5, 0.77, 1.0)
    assert found.quantiles(q) == pytest.approx(np.quantile(found.every.numpy(), q).tolist(), rel=1e-13)
    layer = found.norms["3.weight"].numpy()
    assert found.quantiles(q, "3.weight") == pytest.approx(np.quantile(layer, q).tolist(), rel=1e-13)


def test_half_precision_does_not_overflow():
    model = torch.nn.Linear(1000, 2).half()
    torch.nn.init.constant_(model.weight, 6e4)
    found = filter_norms(Objective(model, nets.losses, [torch.zeros(1, 1000)]))
    w = model.weight[0, 0].item()
    assert found.every.tolist() == pytest.approx([w * 1000**0.5] * 2, rel=1e-12)


def test_no_filters():
    model, batch = nets.mlp()
    with pytest.raises(ValueError, match="none of the chosen parameters has two or more dimensions"):
        filter_norms(Objective(model, nets.losses, [batch], params="bias"))


def test_plot():
    pytest.importorskip("matplotlib").use("agg")
    model, batch = nets.convnet()
    found = filter_norms(Objective(model, nets.losses, [batch]))
    axes = found.plot(label="one")
    assert found.plot(axes, label="two") is axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "two"]
