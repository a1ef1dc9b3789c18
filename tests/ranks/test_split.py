"""The two passes of RWP on two groups of ranks: the sequential method with the ranks' data, at any α, in any world."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import nets
import steppe
from launch import launch
from recipes_list import BASES, same, weights

STEPS, EACH = 20, 4


def stream(step: int, world: int) -> list[nets.Data]:
    """The examples of a step: 4 a rank."""
    with torch.random.fork_rng():
        torch.manual_seed(step)
        return [(torch.randn(EACH, 6, dtype=torch.float64), torch.randint(nets.CLASSES, (EACH,))) for _ in range(world)]


def joined(parts: list[nets.Data]) -> nets.Data:
    x, y = zip(*parts, strict=True)
    return torch.cat(x), torch.cat(y)


def wrap(model: nn.Module, text: str, base: str = "sgd", **kwargs: Any) -> steppe.SharpnessAware:
    return steppe.SharpnessAware(BASES[base](model.parameters()), steppe.parse(text), total_steps=STEPS, **kwargs)


def split(text: str, base: str = "sgd", micro: int = 1, ddp: dict[str, Any] | None = None) -> Any:
    """Weights, passes taken and propagations a step, of a training with the passes on different ranks."""
    model, _ = nets.mlp()
    opt, network, passes = wrap(model, text, base, split=True), DistributedDataParallel(model, **(ddp or {})), [0]
    model.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    for step in range(STEPS):
        data = stream(step, dist.get_world_size())[dist.get_rank()]
        opt.step(steppe.Batch(network, nets.losses, data, micro=micro))
    return weights(model), passes[0] / micro, opt.stats.propagations


def sequential(text: str, world: int, plain: int, base: str = "sgd") -> list[Tensor]:
    """Weights of the same on one process: pass one on the data of the first ranks, pass two on the others'."""
    model, _ = nets.mlp()
    opt = wrap(model, text, base)
    for step in range(STEPS):
        parts = stream(step, world)
        if opt.method.needs_second:
            one, two = (steppe.Batch(model, nets.losses, joined(p)) for p in (parts[:plain], parts[plain:]))
            opt.step(one, two)
        else:
            opt.step(steppe.Batch(model, nets.losses, joined(parts)))
    return weights(model)


def assert_close(a: list[Tensor], b: list[Tensor]) -> None:
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize(("world", "alpha"), [(2, 0.5), (2, 0.25), (2, 0.99), (3, 0.5), (3, 1 / 3), (3, 2 / 3)])
def test_two_groups_of_ranks_are_the_sequential_method(world, alpha, base):
    found = launch(world, split, f"rwp(gamma=0.1, alpha={alpha})", base)
    for end, passes, propagations in found:
        assert same(end, found[0][0])
        assert passes == STEPS, "each rank takes one pass a step"
        assert propagations == 1
    assert_close(found[0][0], sequential(f"rwp(gamma=0.1, alpha={alpha}, other=True)", world, 1, base))


def seconds(text: str) -> list[Tensor]:
    """Weights where every rank hands over a second batch, which is the other rank's."""
    model, _ = nets.mlp()
    opt, network = wrap(model, text, split=True), DistributedDataParallel(model)
    for step in range(STEPS):
        parts = stream(step, 2)
        here = dist.get_rank()
        opt.step(*(steppe.Batch(network, nets.losses, parts[i]) for i in (here, 1 - here)))
    return weights(model)


def test_the_perturbed_ranks_take_the_second_batch():
    first, second = launch(2, seconds, "rwp(gamma=0.1, other=True)")
    assert same(first, second)
    model, _ = nets.mlp()
    opt = wrap(model, "rwp(gamma=0.1)")
    for step in range(STEPS):
        opt.step(steppe.Batch(model, nets.losses, stream(step, 2)[0]))  # rank 0's first and rank 1's second
    assert_close(first, weights(model))


def test_a_second_batch_is_not_asked_for_where_the_ranks_bring_their_own():
    found = launch(2, split, "rwp(gamma=0.1, alpha=0.3, other=True)")
    assert_close(found[0][0], sequential("rwp(gamma=0.1, alpha=0.3, other=True)", 2, 1))


def test_four_ranks_are_two_and_two():
    found = launch(4, split, "rwp(gamma=0.1, alpha=0.3)")
    assert all(same(end, found[0][0]) and passes == STEPS for end, passes, _ in found)
    assert_close(found[0][0], sequential("rwp(gamma=0.1, alpha=0.3, other=True)", 4, 2))


@pytest.mark.parametrize("alpha", [0, 1])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_where_one_gradient_is_all_every_rank_takes_it(world, alpha):
    found = launch(world, split, f"rwp(gamma=0.1, alpha={alpha})")
    assert all(same(end, found[0][0]) for end, _, _ in found)
    if world > 1 or alpha == 0:
        assert all(passes == STEPS for _, passes, _ in found)
    assert_close(found[0][0], sequential(f"rwp(gamma=0.1, alpha={alpha})", world, 0))


def test_one_rank_is_sequential():
    ((end, passes, _),) = launch(1, split, "rwp(gamma=0.1, alpha=0.3)")
    assert passes == 2 * STEPS
    assert_close(end, sequential("rwp(gamma=0.1, alpha=0.3)", 1, 0))


def test_without_ranks_it_is_sequential():
    ends = []
    for kwargs in ({"split": True}, {}):
        model, data = nets.mlp()
        opt = wrap(model, "rwp(gamma=0.1)", **kwargs)
        for _ in range(5):
            opt.step(steppe.Batch(model, nets.losses, data))
        ends.append(weights(model))
    assert same(*ends)


@pytest.mark.parametrize("options", [{"gradient_as_bucket_view": True}, {"static_graph": True}])
def test_options_of_ddp_under_split(options):
    found = launch(2, split, "rwp(gamma=0.1)", "sgd", 1, options)
    assert_close(found[0][0], sequential("rwp(gamma=0.1, other=True)", 2, 1))


def test_micro_batches_under_split():
    found = launch(2, split, "rwp(gamma=0.1)", "sgd", 2)
    assert all(passes == STEPS for _, passes, _ in found)
    assert_close(found[0][0], sequential("rwp(gamma=0.1, other=True)", 2, 1))


def coin() -> Any:
    """Weights of RWP at random under split, and of the same by hand on one process, with each step's coin."""
    text, world = "rst(rwp(gamma=0.1, alpha=0.3), p=0.5)", dist.get_world_size()
    model, _ = nets.mlp()
    twin, _ = nets.mlp()
    opt, network = wrap(model, text, split=True), DistributedDataParallel(model)
    plain = BASES["sgd"](twin.parameters())
    heads = steppe.SharpnessAware(plain, steppe.parse("rwp(gamma=0.1, alpha=0.3, other=True)"))
    tails = steppe.SharpnessAware(plain, steppe.sgd())
    sharp = []
    for step in range(STEPS):
        parts, before = stream(step, world), opt.stats.sharp
        opt.step(steppe.Batch(network, nets.losses, parts[dist.get_rank()]))
        sharp.append(opt.stats.sharp > before)
        heads.stats.steps = step  # noise is a function of the step
        if sharp[-1]:
            heads.step(*(steppe.Batch(twin, nets.losses, joined(p)) for p in (parts[:1], parts[1:])))
        else:
            tails.step(steppe.Batch(twin, nets.losses, joined(parts)))
    return weights(model), weights(twin), sharp


def test_a_coin_decides_for_all_ranks():
    (first, twin, coins), (second, _, others) = launch(2, coin)
    assert same(first, second)
    assert coins == others, "every rank counts a sharp step, the plain ones too"
    assert 0 < sum(coins) < STEPS
    assert_close(first, twin)


def normed() -> list[Tensor]:
    """Running statistics of BatchNorm under split, with weights at rest."""
    model, (x, y) = nets.convnet()
    opt = steppe.SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.0), steppe.rwp(gamma=0.5), split=True)
    network = DistributedDataParallel(model)
    data = (x.chunk(2)[dist.get_rank()], y.chunk(2)[dist.get_rank()])
    for _ in range(3):
        opt.step(steppe.Batch(network, nets.losses, data))
    return [t.clone() for t in model.buffers()]


def test_statistics_come_from_unperturbed_weights():
    first, _ = launch(2, normed)
    model, (x, _) = nets.convnet()
    with torch.no_grad():
        for _ in range(3):
            model(x.chunk(2)[0])
    assert same(first, list(model.buffers()))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("sam()", "pass one"),
        ("mixed_sam()", "pass one"),
        ("gsam()", "pass one"),
        ("esam_swp()", "pass one"),
        ("rst(sam())", "pass one"),
        ("looksam()", "pass one"),
        ("grst(rwp())", "mix"),
        ("m_sharpness(rwp(), 2)", "groups"),
    ],
)
def test_passes_that_depend_on_each_other_are_refused(text, reason):
    with pytest.raises(ValueError, match=f"split=True.*{reason}"):
        wrap(nets.mlp()[0], text, split=True)
