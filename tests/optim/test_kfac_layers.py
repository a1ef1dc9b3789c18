"""Which layers have a block, and why the others have none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fisher_blocks import estimated, gap, made, normal
from steppe.lab.models import ViT
from steppe.optim.layers import blocks, capture


def names(model: nn.Module, **how) -> tuple[list[str], dict[str, str]]:
    found, fallback = blocks(model, list(model.parameters()), **how)
    return [block.name for block in found], fallback


def test_vision_transformer():
    model = ViT(width=64, depth=1)
    found, fallback = names(model)
    inside = ["norm1", "qkv", "project", "norm2", "mlp.0", "mlp.2"]
    assert found == ["embed", *(f"blocks.0.{name}" for name in inside), "norm", "head"]
    assert fallback == dict.fromkeys(["token", "positions"], "ViT is no layer that K-FAC knows")
    known, _ = blocks(model, list(model.parameters()))
    covered = {p for block in known for p in block.params} | {model.token, model.positions}
    assert covered == set(model.parameters())


def test_attention_of_torch():
    """Its output projection is a linear layer whose forward pass never runs."""
    found, fallback = names(nn.TransformerEncoderLayer(4, 2, 8))
    assert found == ["linear1", "linear2", "norm1", "norm2"]
    inside = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
    assert fallback == dict.fromkeys(
        [f"self_attn.{name}" for name in inside], "nn.MultiheadAttention does not show its matrix products"
    )


def test_tied_weights():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5)
            self.head.weight = self.table.weight

    model = Tied()
    found, fallback = names(model)
    assert found == ["inner", "head"]
    assert fallback == {"table.weight": "it is shared by table and head"}
    assert [block.params for block in blocks(model, list(model.parameters()))[0]][1] == [model.head.bias]


def test_other_layers():
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Renamed(nn.Conv2d):
        pass

    model = nn.ModuleDict({
        "recurrent": nn.LSTM(2, 3),
        "up": nn.ConvTranspose2d(2, 2, 2),
        "own": Own(2, 2),
        "renamed": Renamed(2, 2, 2),
        "instance": nn.InstanceNorm2d(2, affine=True),
        "sparse": nn.Embedding(3, 2, sparse=True),
        "weighted": parametrizations.weight_norm(nn.Linear(2, 2)),
        "spectral": nn.utils.spectral_norm(nn.Conv1d(2, 2, 2)),
    })  # fmt: skip
    found, fallback = names(model)
    assert found == ["renamed"]
    assert set(fallback) == {name for name, _ in model.named_parameters()} - {"renamed.weight", "renamed.bias"}
    by_layer = {name.split(".")[0]: set() for name in fallback}
    for name, reason in fallback.items():
        by_layer[name.split(".")[0]].add(reason)
    assert by_layer == {
        "recurrent": {"LSTM is no layer that K-FAC knows"},
        "up": {"ConvTranspose2d is no layer that K-FAC knows"},
        "own": {"Own has a forward pass of its own"},
        "instance": {"InstanceNorm2d is no layer that K-FAC knows"},
        "sparse": {"the gradient of this nn.Embedding is sparse or scaled by frequency"},
        "weighted": {"Linear is parametrized, and computes its weight"},
        "spectral": {"Conv1d computes its weight"},
    }


def test_only_what_is_trained():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    found, fallback = blocks(model, [model[0].bias, model[2].weight, model[2].bias])
    assert [(block.name, [tuple(p.shape) for p in block.params]) for block in found] == [
        ("0", [(3,)]),
        ("2", [(2, 3), (2,)]),
    ]
    assert not fallback


def test_a_layer_alone_is_named_by_its_type():
    assert names(nn.Linear(2, 2)) == (["Linear"], {})


def test_capture_leaves_no_trace_and_sees_no_pass_without_gradients():
    model = made(lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)))
    known, _ = blocks(model, list(model.parameters()))
    x = normal(4, 2)
    with pytest.raises(RuntimeError, match="shapes"), capture(known, 4) as seen:  # noqa: PT012
        with torch.no_grad():
            model(x)
        assert not any(each.inputs or each.edges for each in seen)
        model(x)
        model(x.T)
    assert [len(each.inputs) for each in seen] == [1, 1]
    assert not any(module._forward_hooks for module in model.modules())
    assert all(not x.requires_grad for each in seen for x in each.inputs)


def test_checkpointed_activations_are_seen_once():
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(2, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)
            return self.head(torch.tanh(hidden))

    model, x = made(Checkpointed), normal(4, 2)
    plain = made(lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)))
    for (_, state), (_, wanted) in zip(estimated(model, x), estimated(plain, x), strict=True):
        assert all(gap(state[key], wanted[key]) < 1e-12 for key in ("A", "G"))


def test_inputs_by_keyword_and_of_one_example():
    """Layers take an input by its name, and without a dimension of examples."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv1d(2, 3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.conv(input=x[0])).sum(1))[None]

    class Even(Odd):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.conv(x)).sum(2))

    x = normal(1, 2, 4)
    for (_, state), (_, wanted) in zip(estimated(made(Odd), x), estimated(made(Even), x), strict=True):
        assert all(gap(state[key], wanted[key]) < 1e-12 for key in ("A", "G"))
