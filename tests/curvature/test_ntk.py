"""The neural tangent kernel against closed forms and central differences."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nets
from quadratics import normal
from steppe.curvature.ntk import ntk
from steppe.curvature.objective import Objective


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum(1)


def test_of_a_linear_model_it_is_the_gram_matrix():
    x = normal(5, 4)
    found = ntk(Objective(nn.Linear(4, 3).double(), squares, [x[:2], x[2:]]))
    gram = x @ x.T + 1
    assert torch.allclose(found.kernel, torch.kron(gram, torch.eye(3).double()), rtol=1e-13, atol=1e-13)
    values = torch.linalg.eigvalsh(gram)
    assert found.condition == pytest.approx(float(values[-1] / values[0]), rel=1e-9)
    assert (found.examples, found.rank, found.singular) == (5, 15, False)
    assert found.passes == pytest.approx(1 / 3 + 2 / 3 * 3)


@pytest.mark.parametrize("net", [nets.mlp, nets.convnet, nets.transformer])
def test_against_central_differences(net):
    model, (x, y) = net()
    model.eval()
    objective = Objective(model, nets.losses, [(x[:2], y[:2]), (x[2:5], y[2:5])])
    found = ntk(objective, 3)
    columns, step = [], 1e-5
    with torch.no_grad():
        for p in model.parameters():
            for i in range(p.numel()):
                start = p.view(-1)[i].item()
                ends = []
                for side in (step, -step):
                    p.view(-1)[i] = start + side
                    ends.append(model(x[:3]).flatten())
                p.view(-1)[i] = start
                columns.append((ends[0] - ends[1]) / (2 * step))
    jacobian = torch.stack(columns, 1)
    assert found.kernel.shape == (9, 9)
    error = (found.kernel - jacobian @ jacobian.T).norm() / found.kernel.norm()
    assert error < 1e-8
    assert not found.singular
    assert found.condition == pytest.approx(float(torch.linalg.cond(jacobian @ jacobian.T)), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_two_examples_alike_make_it_singular(dtype):
    model, (x, y) = nets.mlp()
    x = torch.cat([x[:3], x[:1]])
    objective = Objective(model.to(dtype), nets.losses, [(x.to(dtype), y[:4])])
    found = ntk(objective)
    assert found.singular
    assert found.rank == 9
    assert found.condition == math.inf


def test_chosen_outputs():
    model, batch = nets.mlp()
    objective = Objective(model, nets.losses, [batch])
    whole = ntk(objective, 4).kernel.view(4, 3, 4, 3)
    found = ntk(objective, 4, outputs=[2, 0])
    assert torch.allclose(found.kernel.view(4, 2, 4, 2), whole[:, [2, 0]][..., [2, 0]], rtol=1e-12)
    for outputs in ([3], []):
        with pytest.raises(ValueError, match="an example has 3 outputs, and at least one must be chosen"):
            ntk(objective, outputs=outputs)


def test_chosen_parameters():
    x = normal(3, 4)
    model = nn.Linear(4, 2).double()
    found = ntk(Objective(model, squares, [x], params="bias"))
    assert torch.equal(found.kernel, torch.ones(3, 3).double().kron(torch.eye(2).double()))
    assert found.condition == math.inf


class TwoHeads(nn.Module):
    """Returns what the loss looks at beside what it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.other = nn.Linear(4, 3).double(), nn.Linear(4, 7).double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net(x), "other": self.other(x)}


def test_the_outputs_are_those_the_loss_uses():
    x, y = normal(4, 4), torch.tensor([0, 1, 2, 0])
    model = TwoHeads()

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["x"])["logits"], batch["y"], reduction="none")

    found = ntk(Objective(model, loss, [{"x": x, "y": y}]))
    assert torch.allclose(found.kernel, torch.kron(x @ x.T + 1, torch.eye(3).double()))


def test_what_is_refused():
    model, batch = nets.mlp()
    with pytest.raises(ValueError, match='mode="eval"'):
        ntk(Objective(model, nets.losses, [batch], mode="train"))
    with pytest.raises(ValueError, match="examples=0"):
        ntk(Objective(model, nets.losses, [batch]), 0)
    with pytest.raises(ValueError, match="loss is nan"):
        ntk(Objective(model, lambda model, batch: nets.losses(model, batch) * math.nan, [batch]))


def test_progress_goes_to_the_end():
    model, batch = nets.mlp()
    seen: list[float] = []
    ntk(Objective(model, nets.losses, [batch]), 4, progress=seen.append)
    assert seen == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 11, 12])
def test_a_jacobian_that_is_not_held_as_a_whole_gives_the_same_kernel(rows, monkeypatch):
    model, batch = nets.mlp()
    objective = Objective(model, nets.losses, [batch])
    whole, seen = ntk(objective, 4), []
    monkeypatch.setattr(sys.modules[ntk.__module__], "ROOM", rows * objective.size)
    found = ntk(objective, 4, progress=seen.append)
    torch.testing.assert_close(found.kernel, whole.kernel, rtol=1e-13, atol=1e-13)
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1)
    strips = range(0, 12, rows)
    gradients = sum(2 / 3 * (12 - start) + 1 / 3 * (4 - start // 3) for start in strips)
    assert found.passes == pytest.approx(gradients / len(batch[1]))


class Uneven(nn.Module):
    """Its second output hardly moves; its third, if there is one, is what makes the sum 0."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.linear, self.outputs = nn.Linear(4, 2), outputs

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(x).tanh() * torch.tensor([1.0, 1e-3])
        return torch.cat([z, -z.sum(1, keepdim=True)], 1)[:, : self.outputs]


@pytest.mark.parametrize(("outputs", "rank"), [(2, 6), (3, 6)])
def test_small_eigenvalues_are_told_from_0_in_single_precision(outputs, rank):
    torch.manual_seed(0)
    model, x = Uneven(outputs), torch.randn(3, 4)
    found = ntk(Objective(model, squares, [x]))
    assert found.rank == rank
    if outputs == 2:
        double = ntk(Objective(model.double(), squares, [x.double()]))
        assert found.condition == pytest.approx(double.condition, rel=1e-3)
        assert found.condition > 1e6
