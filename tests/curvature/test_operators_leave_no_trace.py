"""Operators leave the model and the generators as they found them, on an exception too."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import spectral_norm

from exact import dense, gap, losses, made, operator, probes, small, uneven, untouched
from steppe.curvature.objective import Objective
from steppe.curvature.operator import Operator

KINDS = ["hessian", "ggn", "fisher", "empirical"]
BATCHES = uneven(4, sizes=(4, 3, 2))


def layers() -> nn.Module:
    """Norms with statistics, dropout, spectral norm; modes mixed, one weight frozen, gradients there or not."""
    model = made(
        lambda: nn.Sequential(
            spectral_norm(nn.Linear(4, 5)), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3)
        )
    )
    model(torch.randn(6, 4, dtype=torch.float64)).sum().backward()
    model[1].eval()
    model[4].bias.requires_grad_(False)
    model[4].weight.grad = None
    return model


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_as_it_was(kind, mode, outer):
    model = layers().train(outer)
    model[1].eval()
    objective = Objective(model, losses, BATCHES, mode=mode)
    A = Operator(objective, kind)
    v = probes(A.size, 2)
    with untouched(model):
        A @ v
        objective.loss()
        objective.gradient()
        Operator(objective.only(r"^4"), kind) @ v[:18]


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("place", ["loss", "model", "loader"])
def test_the_model_is_as_it_was_after_an_exception(place, mode):
    model = layers()
    calls = []

    def trip(here):
        if here == place:
            calls.append(here)
            if len(calls) == 2:
                raise KeyError("on purpose")

    class Loader:
        def __iter__(self):
            for batch in BATCHES:
                trip("loader")
                yield batch

    def loss_fn(model, batch):
        trip("loss")
        return losses(model, batch)

    model[4].register_forward_hook(lambda *_: trip("model"))
    objective = Objective(model, loss_fn, Loader(), mode=mode)
    v = torch.ones(objective.size, dtype=torch.float64)
    for measure in (lambda: Operator(objective) @ v, lambda: Operator(objective, "ggn") @ v, objective.loss):
        calls.clear()
        with untouched(model), pytest.raises(KeyError, match="on purpose"):
            measure()
    calls[:] = [place] * 2
    assert gap(Operator(objective) @ v, operator(model, losses, BATCHES, mode=mode) @ v) < 1e-13


def test_an_embedding_that_renormalises_its_weights_keeps_them():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 4, max_norm=0.5), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.embed(x).mean(1))

    model = made(Words)
    batches = [(torch.tensor([[0, 1], [2, 3]]), torch.tensor([0, 2]))]
    with untouched(model):
        operator(model, losses, batches) @ torch.ones(35, dtype=torch.float64)


def test_moved_weights_are_back_to_the_bit():
    model = layers()
    with torch.no_grad():
        model[4].weight[0, :2] = torch.tensor([-0.0, 1e-310])
    objective = Objective(model, losses, BATCHES)
    u = probes(objective.size, 2)
    start = objective.join(objective.params).detach().clone()
    with untouched(model):
        with objective.moved() as move:
            move((0.1, u[:, 0]), (-2.0, objective.split(u[:, 1])))
            torch.testing.assert_close(objective.join(objective.params).detach(), start + 0.1 * u[:, 0] - 2 * u[:, 1])
            move((0.5, u[:, 0]))
            torch.testing.assert_close(objective.join(objective.params).detach(), start + 0.5 * u[:, 0])
            move()
            assert torch.equal(objective.join(objective.params).detach(), start)
            move((1e300, u[:, 0]))
        with pytest.raises(KeyError), objective.moved() as move:
            raise KeyError(move((0.1, u[:, 0])))


def test_what_is_forced_inside_is_free_again_outside():
    model, seen = small(), []

    def loss_fn(model, batch):
        seen.append((torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()))
        return losses(model, batch)

    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        operator(model, loss_fn, BATCHES) @ torch.ones(43, dtype=torch.float64)
        assert torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cuda.math_sdp_enabled()
    assert set(seen) == {(False, False)}


def test_random_losses_and_augmentation_by_torch_are_the_same_each_time():
    """Whatever is drawn from the global generator is drawn again, whether or not the products share a ``still``."""

    class Noisy:
        def __iter__(self):
            for x, y in BATCHES:
                yield x + torch.rand(1).double(), y

    model, v = small(), probes(43, 1)[:, 0]

    def loss_fn(model, batch):
        return losses(model, (batch[0] + torch.randn_like(batch[0]), batch[1]))

    objective = Objective(model, loss_fn, Noisy())
    A = Operator(objective)
    first = A @ v
    torch.rand(3)
    assert torch.equal(A @ v, first)
    with objective.still():
        assert torch.equal(A @ v, first)
        assert torch.equal(A @ v, first)
    with untouched(model):
        assert Objective(model, loss_fn, Noisy(), mode="train").examples == 9
    assert gap(dense(A), dense(A).T) < 1e-13
