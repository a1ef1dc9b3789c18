"""DistributedDataParallel: the same run on one process and on several, m-sharpness, and ranks that stay alike."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import nets
import steppe
from ddp_work import alone, assert_close, part, stream, together, wrap
from launch import launch
from recipes_list import EVERY, same, weights

WHOLE = [text for text in EVERY if "m_sharpness" not in text]


@pytest.mark.parametrize("text", WHOLE)
def test_global_ascent_on_two_ranks_is_one_process(text):
    first, second = launch(2, together, text)
    assert same(first, second)
    assert_close(first, alone(text))


@pytest.mark.parametrize("text", ["esam()", "gsam()", "rwp(other=True)"])
@pytest.mark.parametrize(
    ("world", "name", "micro"), [(1, "mlp", 1), (3, "mlp", 1), (2, "transformer", 1), (2, "mlp", 4)]
)
def test_any_number_of_ranks_and_of_micro_batches_is_one_process(text, world, name, micro):
    ends = launch(world, together, text, name, "global", micro)
    assert all(same(ends[0], end) for end in ends)
    assert_close(ends[0], alone(text, name))


LOCAL = [
    "sam()",
    "sam(steps=2)",
    "sam(second_order=True)",
    "asam()",
    "gsam()",
    "esam()",
    "esam_sds(gsam())",
    "rwp()",
    "rwp(alpha=0)",
    "rst(esam(), p=0.5)",
    "grst(sam())",
]


@pytest.mark.parametrize("text", LOCAL)
def test_local_ascent_is_m_sharpness_with_the_ranks_batches(text):
    first, second = launch(2, together, text, "mlp", "local")
    assert same(first, second)
    assert_close(first, alone(f"m_sharpness({text}, 6)"))


@pytest.mark.parametrize("text", ["sam()", "esam()", "esam_swp(beta=0.2)", "rwp()", "gsam()"])
def test_groups_within_the_ranks_are_groups_of_the_whole(text):
    text = f"m_sharpness({text}, 3)"
    first, second = launch(2, together, text)
    assert same(first, second)
    assert_close(first, alone(text))


def test_local_ascent_is_not_global_ascent():
    a, b = alone("m_sharpness(sam(), 6)"), alone("sam()")
    assert max(float((p - q).abs().max()) for p, q in zip(a, b, strict=True)) > 1e-4


@pytest.mark.parametrize("text", ["looksam(k=2)", "ssam()", "ssam_dynamic()"])
def test_local_ascent_is_refused_where_one_memory_is_shared(text):
    with pytest.raises(ValueError, match='ascent="local"'):
        wrap(nets.mlp()[0], text, ascent="local")


def reductions(text: str, ascent: str, micro: int) -> list[float]:
    """Reductions of the gradients a step, in copies of them: DDP's own and those by hand."""
    model, _ = nets.mlp()
    opt, network, entries = wrap(model, text, ascent=ascent), DistributedDataParallel(model), [0]
    reduce, size = dist.all_reduce, sum(p.numel() for p in model.parameters())

    def hook(_, bucket):  # DDP refuses annotations that are strings
        entries[0] += bucket.buffer().numel()
        work = reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        entries[0] += tensor.numel()
        return reduce(tensor, *args, **kwargs)

    network.register_comm_hook(None, hook)
    dist.all_reduce, found = counted, []
    for step in range(4):
        entries[0] = 0
        data = part(stream("mlp", step), dist.get_rank(), dist.get_world_size())
        opt.step(steppe.Batch(network, nets.losses, data, micro=micro))
        found.append(entries[0] / size)
    dist.all_reduce = reduce
    return found


@pytest.mark.parametrize(
    ("text", "ascent", "micro", "count"),
    [
        ("sgd()", "global", 3, [1] * 4),
        ("sam()", "global", 1, [2] * 4),
        ("sam()", "global", 3, [2] * 4),
        ("sam()", "local", 1, [1] * 4),
        ("sam()", "local", 3, [1] * 4),
        ("sam(steps=2)", "local", 1, [1] * 4),
        ("gsam()", "local", 1, [1] * 4),
        ("esam()", "local", 1, [1] * 4),
        ("rwp()", "local", 3, [1] * 4),
        ("m_sharpness(sam(), 3)", "global", 1, [1] * 4),
        ("rwp(alpha=0)", "global", 1, [1] * 4),
        ("esam_sds()", "global", 1, [2] * 4),
        ("looksam(k=2)", "global", 1, [2, 1, 2, 1]),
    ],
)
def test_gradients_are_reduced_as_often_as_stated(text, ascent, micro, count):
    assert launch(2, reductions, text, ascent, micro) == [count] * 2


def test_masked_pass_one_reduces_what_it_picked_only():
    first, second = launch(2, reductions, "esam_swp(beta=0.5)", "global", 1)
    assert first == second
    assert all(1 <= count < 2 for count in first)
    assert len(set(first)) > 1


def long() -> tuple[list[Tensor], Any, Tensor]:
    """Weights, momenta and a draw after 500 steps in float32, with dropout that each rank draws for itself."""
    mlp, (x, y) = nets.mlp()
    model = nn.Sequential(*mlp[:2], nn.Dropout(0.2), *mlp[2:]).float()
    opt = wrap(model, "rst(esam(), p=0.5)")
    network = DistributedDataParallel(model)
    data = part((x.float(), y), dist.get_rank(), dist.get_world_size())
    for _ in range(500):
        opt.step(steppe.Batch(network, nets.losses, data))
    return weights(model), opt.state_dict()["state"], torch.rand(())


def test_ranks_are_identical_after_500_steps():
    (first, momenta, draw), (second, others, another) = launch(2, long)
    assert same(first, second)
    assert same(momenta, others)
    assert draw != another, "each rank has drawn its own dropout"


def poisoned(text: str, ascent: str, at_pass: int | None, split: bool) -> Any:
    """A NaN in rank 1's examples, or in its loss of one pass only, at step 3: what each rank says, and what is left."""
    model, _ = nets.mlp()
    opt, network, passes = wrap(model, text, ascent=ascent, split=split), DistributedDataParallel(model), [0]
    rank, said, before = dist.get_rank(), "", None

    def losses(m: nn.Module, data: nets.Data) -> Tensor:
        passes[0] += 1
        found = nets.losses(m, data)
        return found * torch.nan if rank == 1 and opt.stats.steps == 3 and passes[0] == at_pass else found

    for step in range(6):
        x, y = part(stream("mlp", step), rank, 2)
        if step == 3 and rank == 1 and at_pass is None:
            x = x.clone()
            x[0, 0] = torch.nan
        passes[0] = 0
        state = copy.deepcopy(opt.state_dict())
        before = weights(model)
        try:
            opt.step(steppe.Batch(network, losses, (x, y)))
        except ValueError as error:
            said = str(error)
            assert same(weights(model), before)
            after = opt.state_dict()
            assert same([after["state"]], [state["state"]])
            assert opt.stats.steps == step == 3
            at_pass = 0
            opt.step(steppe.Batch(network, losses, part(stream("mlp", step), rank, 2)))
    return said, weights(model), opt.stats.steps


@pytest.mark.parametrize(
    ("text", "ascent", "at_pass", "split"),
    [
        ("sgd()", "global", None, False),
        ("sam()", "global", None, False),
        ("sam()", "global", 2, False),
        ("sam()", "local", None, False),
        ("sam()", "local", 2, False),
        ("gsam()", "local", 1, False),
        ("esam()", "global", 1, False),
        ("esam()", "global", 3, False),
        ("esam_sds()", "local", None, False),
        ("looksam(k=3)", "global", None, False),
        ("ssam(refresh=3)", "global", None, False),
        ("ssam_dynamic(refresh=3)", "global", 2, False),
        ("rwp()", "global", 1, False),
        ("rwp(alpha=0.3)", "global", None, True),
        ("m_sharpness(sam(), 3)", "global", 4, False),
    ],
)
def test_a_nan_on_one_rank_stops_all_of_them(text, ascent, at_pass, split):
    (first, end, steps), (second, other, _) = launch(2, poisoned, text, ascent, at_pass, split, seconds=20)
    for said in (first, second):
        assert "at step 3" in said, "the step went through"
    assert same(end, other), "and they go on together"
    assert steps == 6
    assert all(t.isfinite().all() for t in end)
