"""The Analyzer: one call for each measurement, and the model as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nets
import steppe
from exact import untouched
from steppe.curvature import Analyzer


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        return x + F.gelu(self.linear(self.norm(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.blocks = nn.Sequential(Block(4), Block(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.blocks(self.embed(x)))


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def right(output, batch):
    return (output.argmax(1) == batch[1]).float()


@pytest.fixture
def analyzer():
    torch.manual_seed(0)
    data = [(torch.randn(n, 3).double(), torch.randint(2, (n,))) for n in (6, 4, 1)]
    return Analyzer(Net().double(), cross_entropy, data, accuracy_fn=right, seed=3)


CALLS = {
    "eigenvalues": lambda an: an.eigenvalues(k=3),
    "smallest": lambda an: an.eigenvalues(which="smallest"),
    "power": lambda an: an.eigenvalues(method="power", tol=0.1),
    "spectrum": lambda an: an.spectrum(steps=5, draws=2),
    "trace": lambda an: an.trace(products=8),
    "diagonal": lambda an: an.diagonal(products=4),
    "surrogate_gap": lambda an: an.surrogate_gap(0.1),
    "m_sharpness": lambda an: an.m_sharpness(0.1, 3),
    "average_sharpness": lambda an: an.average_sharpness(draws=2),
    "linearity": lambda an: an.linearity(0.1),
    "cosines": lambda an: an.cosines(0.1),
    "pac_bayes": lambda an: an.pac_bayes(0.1),
    "ntk": lambda an: an.ntk(4),
    "active_neurons": lambda an: an.active_neurons(),
    "landscape": lambda an: an.landscape(dims=1, points=3, draws=2),
    "line": lambda an: an.line({k: 2 * v for k, v in an.objective.model.state_dict().items()}, points=3),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_measurement_is_one_call_that_says_its_cost_and_leaves_no_trace(analyzer, name):
    before = analyzer.objective.passes
    with untouched(analyzer.objective.model):
        found = CALLS[name](analyzer)
    assert found.passes == pytest.approx(analyzer.objective.passes - before)
    assert found.passes > 0


def test_the_seed_fixes_the_draws(analyzer):
    first, again = analyzer.trace(products=8), analyzer.trace(products=8)
    assert first.value == again.value
    analyzer.seed = 4
    assert analyzer.trace(products=8).value != first.value


def test_blocks_are_those_of_the_matrix(analyzer):
    found = analyzer.eigenvalues_by(r"blocks\.\d+", tol=1e-10)
    H = analyzer.operator() @ torch.eye(analyzer.objective.size, dtype=torch.float64)
    for name, block in found.items():
        rows, first = [], 0
        for parameter, p in zip(analyzer.objective.names, analyzer.objective.params, strict=True):
            rows += range(first, first + p.numel()) if name == "whole" or parameter.startswith(f"{name}.") else []
            first += p.numel()
        assert block.values[0] == pytest.approx(float(torch.linalg.eigvalsh(H[rows][:, rows])[-1]), rel=1e-8)
    assert list(found) == ["blocks.0", "blocks.1", "whole"]


def test_blocks_may_be_named(analyzer):
    found = analyzer.eigenvalues_by({"norms": r"norm\.", "embedding": "^embed"}, k=2)
    assert list(found) == ["norms", "embedding", "whole"]
    assert [len(block.vectors[0]) for block in found.values()] == [16, 16, analyzer.objective.size]


def test_power_iteration_and_lanczos_agree(analyzer):
    power = analyzer.eigenvalues(method="power", tol=1e-6)
    assert power.values[0] == pytest.approx(float(analyzer.eigenvalues(tol=1e-6).values[0]), rel=1e-6)


def test_accuracy_is_measured_along(analyzer):
    assert analyzer.landscape(dims=1, points=3).accuracy[1] * 11 % 1 == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("call", "culprit"),
    [
        (lambda an: an.eigenvalues_by(r"layers\.\d+"), r"layers"),
        (lambda an: an.eigenvalues(params="convolution"), "convolution"),
        (lambda an: an.eigenvalues(method="qr"), "qr"),
        (lambda an: an.eigenvalues(k=2, method="power"), "power"),
        (lambda an: an.eigenvalues(k=1000), "k=1000"),
    ],
)
def test_bad_input_is_one_line_that_names_the_culprit(analyzer, call, culprit):
    with pytest.raises(ValueError, match=culprit) as caught:
        call(analyzer)
    assert "\n" not in str(caught.value)


def test_it_stands_among_the_public_names():
    assert steppe.curvature.Analyzer is Analyzer


def test_every_call_takes_the_likelihood_that_a_fisher_matrix_asks_for():
    model, x = nn.Linear(3, 2).double(), torch.randn(8, 3, dtype=torch.float64)
    an = Analyzer(model, lambda m, b: m(b).square().sum(1) / 2, [x], progress=False)
    for call in (an.eigenvalues, an.trace, an.diagonal, an.spectrum):
        with pytest.raises(ValueError, match="likelihood"):
            call(kind="fisher")
        call(kind="fisher", likelihood="gaussian")
    assert an.spectrum(params="bias").nodes.shape[1] == 2


def test_blocks_without_parameters_are_passed_over():
    model, data = nets.mlp()
    an = Analyzer(model, nets.losses, [data], progress=False)
    assert list(an.eigenvalues_by(r"\d+")) == ["0", "2", "4", "whole"]
