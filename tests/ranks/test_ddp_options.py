"""DDP's own options: bucket views, static graphs, unused parameters, join() with uneven inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import nets
import steppe
from ddp_work import STEPS, alone, assert_close, part, stream, together, wrap
from launch import launch
from recipes_list import same, weights

OPTIONS = {
    "views": {"gradient_as_bucket_view": True},
    "static": {"static_graph": True},
    "unused": {"find_unused_parameters": True},
    "small buckets": {"bucket_cap_mb": 1e-4, "gradient_as_bucket_view": True},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("text", ["gsam()", "sam(steps=2)", "esam_sds(gsam())", "rst(looksam(k=2), p=0.5)"])
def test_options_of_ddp(text, options):
    first, second = launch(2, together, text, "mlp", "global", 1, OPTIONS[options])
    assert same(first, second)
    assert_close(first, alone(text))


@pytest.mark.parametrize("options", ["views", "unused", "small buckets"])
@pytest.mark.parametrize("text", ["gsam()", "esam()", "m_sharpness(sam(), 3)"])
def test_options_of_ddp_under_local_ascent(text, options):
    first, second = launch(2, together, text, "mlp", "local", 1, OPTIONS[options])
    assert same(first, second)
    assert_close(first, alone(text if "m_sharp" in text else f"m_sharpness({text}, 6)"))


@pytest.mark.parametrize("text", ["m_sharpness(sam(), 3)", "gsam()"])
def test_one_rank_with_bucket_views_is_one_process(text):
    (end,) = launch(1, together, text, "mlp", "global", 1, OPTIONS["views"])
    assert_close(end, alone(text))


def refusal(run: Callable[..., Any], *args: Any) -> str:
    """The words with which something is refused on this rank."""
    with pytest.raises(ValueError, match=r".") as caught:
        run(*args)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "ascent", "micro"), [("sam()", "local", 1), ("esam()", "global", 1), ("sam()", "global", 2)]
)
def test_a_static_graph_is_refused_where_a_first_pass_is_not_reduced(text, ascent, micro):
    """Torch learns the graph from the first backward pass, and fails or hangs if that one is under no_sync."""
    words = launch(2, refusal, together, text, "mlp", ascent, micro, {"static_graph": True}, seconds=20)
    assert words[0] == words[1]
    assert "static_graph" in words[0]


class TwoHeads(nn.Module):
    """A net of which one layer is never used, and another only by batches whose first number is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.body, _ = nets.mlp()
        self.sometimes = nn.Linear(6, nets.CLASSES).double()
        self.never = nn.Linear(6, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y + self.sometimes(x) if x[0, 0] > 0 else y


def heads(text: str, world: int, ascent: str = "global") -> list[Tensor]:
    """Weights of ``TwoHeads``; on one process the ranks' batches are micro-batches."""
    torch.manual_seed(0)
    model: Any = TwoHeads()
    opt, network = wrap(model, text, ascent=ascent), model
    if dist.is_initialized():
        network = DistributedDataParallel(model, find_unused_parameters=True)
    for step in range(STEPS):
        x, y = stream("mlp", step)
        parts = [part((x, y), rank, world) for rank in range(world)]
        if dist.is_initialized():
            parts = [parts[dist.get_rank()]]
        opt.step(steppe.Batch.from_micro_batches(network, nets.losses, parts))
    return weights(model)


@pytest.mark.parametrize("text", ["sam()", "gsam()", "esam_swp()", "rwp()"])
def test_a_layer_that_one_rank_uses_alone(text):
    first, second = launch(2, heads, text, 2)
    assert same(first, second)
    assert_close(first, heads(text, 2))


@pytest.mark.parametrize("text", ["sam()", "gsam()", "esam_swp()"])
def test_a_layer_that_one_rank_uses_alone_under_local_ascent(text):
    first, second = launch(2, heads, text, 2, "local")
    assert same(first, second)
    assert_close(first, heads(f"m_sharpness({text}, 6)", 2))


def uneven(text: str, ascent: str = "global", divide_by_initial: bool = True) -> list[Tensor]:
    """Weights after a training under ``join()``: rank 0 has batches for 3 steps, rank 1 for 7."""
    model, _ = nets.mlp()
    opt, network = wrap(model, text, ascent=ascent), DistributedDataParallel(model)
    with network.join(divide_by_initial_world_size=divide_by_initial):
        for step in range((3, 7)[dist.get_rank()]):
            opt.step(steppe.Batch(network, nets.losses, part(stream("mlp", step), dist.get_rank(), 2)))
    return weights(model)


@pytest.mark.parametrize("text", ["sam()", "gsam()", "rwp()", "looksam(k=2)", "sam(steps=2)"])
@pytest.mark.parametrize("divide_by_initial", [True, False])
def test_join_goes_on_with_the_ranks_that_have_batches(text, divide_by_initial):
    ends = launch(2, uneven, text, "global", divide_by_initial)
    assert same(*ends)
    model, _ = nets.mlp()
    opt = wrap(model, text)
    for step in range(7):
        data = stream("mlp", step)
        factor = 1.0
        if step >= 3:
            data, factor = part(data, 1, 2), 0.5 if divide_by_initial else 1.0
        opt.step(steppe.Batch(model, lambda m, d, factor=factor: factor * nets.losses(m, d), data))
    assert_close(ends[0], weights(model))


def test_join_under_local_ascent():
    ends = launch(2, uneven, "sam()", "local")
    assert same(*ends)
    assert all(t.isfinite().all() for t in ends[0])


@pytest.mark.parametrize(("text", "ascent"), [("esam()", "global"), ("gsam()", "local"), ("esam_sds()", "global")])
def test_join_is_refused_where_the_step_reduces_by_hand(text, ascent):
    words = launch(2, refusal, uneven, text, ascent, seconds=20)
    assert words[0] == words[1]
    assert "join()" in words[0]


def masked_closure(text: str, radius: float | None) -> str:
    """The words with which a closure is refused whose pass one would leave gradients out that DDP waits for."""
    model, data = nets.mlp()
    network = DistributedDataParallel(model)
    opt = wrap(model, text)
    if radius is not None:
        opt.param_groups[0]["rho"] = radius

    def closure() -> Tensor:
        opt.zero_grad()
        loss = nets.losses(network, data).mean()
        loss.backward()
        return loss

    with pytest.raises(TypeError, match=r".") as caught:
        opt.step(closure)
    return str(caught.value)


@pytest.mark.parametrize(("text", "radius"), [("esam_swp()", None), ("sam()", 0.0)])
def test_a_closure_with_a_masked_pass_is_refused_on_several_ranks(text, radius):
    for words in launch(2, masked_closure, text, radius):
        assert "masked pass" in words
        assert "steppe.Batch" in words


def gradient_of_another(text: str, ascent: str = "global", **ddp: Any) -> Tensor:
    """The sum that two steps leave for a layer that the base does not hold, on the rank's part of the batch."""
    model, data = nets.mlp()
    network: nn.Module = DistributedDataParallel(model, **ddp) if dist.is_initialized() else model
    if dist.is_initialized():
        data = part(data, dist.get_rank(), dist.get_world_size())
    opt = steppe.SharpnessAware(SGD(model[:4].parameters(), lr=0.1), steppe.parse(text), ascent=ascent)
    for _ in range(2):
        opt.step(steppe.Batch(network, nets.losses, data))
    return model[4].weight.grad.clone()


@pytest.mark.parametrize(
    ("text", "ascent", "whole"),
    [
        ("sam()", "global", "sam()"),
        ("gsam()", "global", "gsam()"),
        ("sam()", "local", "m_sharpness(sam(), 6)"),
        ("gsam()", "local", "m_sharpness(gsam(), 6)"),
        ("m_sharpness(gsam(), 3)", "local", "m_sharpness(gsam(), 3)"),
    ],
)
def test_a_layer_of_another_optimizer_has_the_gradient_of_one_process(text, ascent, whole):
    for options in ({}, {"gradient_as_bucket_view": True}):
        first, second = launch(2, partial(gradient_of_another, **options), text, ascent)
        assert torch.equal(first, second)
        torch.testing.assert_close(first, gradient_of_another(whole), rtol=0, atol=1e-12)


def flattened() -> str:
    """The words with which a network under FSDP1 is refused."""
    model, data = nets.mlp()
    network = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(ValueError, match=r".") as caught:
        steppe.Batch(network, nets.losses, data)
    return str(caught.value)


def test_fsdp_of_the_first_kind_is_refused():
    for words in launch(2, flattened):
        assert "use fully_shard" in words
