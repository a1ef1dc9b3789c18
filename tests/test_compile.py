"""``torch.compile`` of the model and of the loss: two graphs, one for each kind of pass, and then no more."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch._dynamo as dynamo
import torch._inductor.config as inductor
from torch import Tensor, nn

import nets
import steppe
from recipes_list import step, weights, wrap

STEPS = 6


@pytest.fixture(autouse=True)
def _fresh():
    dynamo.reset()
    dynamo.utils.counters.clear()
    with inductor.patch(compile_threads=1):
        yield
    dynamo.reset()


class Network(nn.Module):
    """Running statistics and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, nets.CLASSES)
        self.batch, self.instance = nn.BatchNorm1d(8), nn.InstanceNorm1d(2, track_running_stats=True)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.batch(self.first(x))
        x = self.instance(x.unflatten(1, (2, 4))).flatten(1)
        return self.last(self.dropout(x.relu()))


def network() -> tuple[nn.Module, nets.Data]:
    torch.manual_seed(0)
    x, y = nets.data(6)
    return Network(), (x.float(), y)


def in_place(model: nn.Module, **how) -> nn.Module:
    model.compile(**how)
    return model


COMPILED = {
    "model": lambda model, **how: (torch.compile(model, **how), nets.losses),
    "in place": lambda model, **how: (in_place(model, **how), nets.losses),
    "loss": lambda model, **how: (model, torch.compile(nets.losses, **how)),
}


def train(text: str, compiled=None, micro: int = 1, **how) -> list[Tensor]:
    """Weights after some steps; from the fourth on, a recompilation raises."""
    model, data = network()
    opt = wrap(model, text, seed=1)
    run, loss = (model, nets.losses) if compiled is None else compiled(model, **how)
    torch.manual_seed(5)
    for t in range(STEPS):
        with dynamo.config.patch(error_on_recompile=t >= 3):
            step(opt, run, data, loss, micro=micro)
        if t == 2:
            graphs = dynamo.utils.counters["stats"]["unique_graphs"]
    assert dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert (graphs > 0) == (compiled is not None)
    return weights(model)


@pytest.mark.parametrize(
    ("text", "what", "micro"),
    [
        ("sam()", "model", 1),
        ("sam()", "in place", 1),
        ("sam()", "loss", 1),
        ("sam()", "model", 3),
        ("esam()", "model", 1),
        ("esam()", "loss", 1),
        ("rwp()", "model", 1),
        ("rwp()", "loss", 1),
    ],
)
def test_no_recompilation_and_the_numbers_of_eager(text, what, micro):
    eager = train(text, micro=micro)
    compiled = train(text, COMPILED[what], micro, backend="aot_eager")
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("text", ["sam(second_order=True)", "ssam(refresh=2)"])
def test_what_a_compiled_graph_cannot_give_runs_in_eager(text):
    """Products with the Hessian, which go backward twice, and the gradients of single examples."""
    eager = train(text)
    compiled = train(text, COMPILED["model"], backend="aot_eager")
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor():
    eager = train("sam()")
    with inductor.patch(fallback_random=True):  # dropout as in eager
        compiled = train("sam()", COMPILED["model"])
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_replays_its_own_random_numbers():
    torch.manual_seed(0)
    model, masks = nn.Sequential(nn.Linear(6, nets.CLASSES), nn.Dropout(0.5)), []
    x, y = nets.data(6)

    def loss(model, data):
        logits = model(data[0])
        masks.append(logits.detach() == 0)
        return nn.functional.cross_entropy(logits, data[1], reduction="none")

    opt = steppe.SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), steppe.sam())
    run = torch.compile(model)
    for _ in range(2):
        step(opt, run, (x.float(), y), loss)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[0], masks[2])
    assert 0 < masks[0].sum() < masks[0].numel()
