"""DistributedDataParallel: the same run on one process and on two, m-sharpness, and the wrapper's own options."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import launch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import nets
import steppe
from recipes_list import BASES, EVERY, same, weights

STEPS = 20
WHOLE = [text for text in EVERY if "m_sharpness" not in text]
NETS: dict[str, Callable[[], tuple[nn.Module, nets.Data]]] = {
    "mlp": nets.mlp,
    "convnet": nets.convnet,
    "transformer": nets.transformer,
}


def stream(name: str, step: int) -> nets.Data:
    """The examples of a step, other ones at every step."""
    _, (x, y) = NETS[name]()
    with torch.random.fork_rng():
        torch.manual_seed(step)
        return torch.randn_like(x), y[torch.randperm(len(y))]


def part(data: nets.Data, rank: int, world: int) -> nets.Data:
    """The rank's examples, consecutive ones."""
    x, y = data
    return x.chunk(world)[rank], y.chunk(world)[rank]


def wrap(model: nn.Module, text: str, **kwargs: Any) -> steppe.SharpnessAware:
    return steppe.SharpnessAware(BASES["sgd"](model.parameters()), steppe.parse(text), total_steps=STEPS, **kwargs)


def batches(opt: steppe.SharpnessAware, make: Callable[[nets.Data], Any], name: str, step: int) -> tuple[Any, Any]:
    """The batch of a step, and the second one where the method takes one."""
    second = make(stream(name, step + 1000)) if opt.method.needs_second else None
    return make(stream(name, step)), second


def alone(text: str, name: str = "mlp", **kwargs: Any) -> list[Tensor]:
    """Weights after a training on one process."""
    model, _ = NETS[name]()
    opt = wrap(model, text, **kwargs)
    for step in range(STEPS):
        opt.step(*batches(opt, lambda data: steppe.Batch(model, nets.losses, data), name, step))
    return weights(model)


def together(
    text: str, name: str = "mlp", ascent: str = "global", micro: int = 1, ddp: dict[str, Any] | None = None
) -> list[Tensor]:
    """Weights after a training on the ranks, each with its part of every batch."""
    model, _ = NETS[name]()
    opt = wrap(model, text, ascent=ascent)
    network = DistributedDataParallel(model, **(ddp or {}))

    def make(data: nets.Data) -> steppe.Batch:
        return steppe.Batch(network, nets.losses, part(data, dist.get_rank(), dist.get_world_size()), micro=micro)

    for step in range(STEPS):
        opt.step(*batches(opt, make, name, step))
    return weights(model)


def assert_close(a: list[Tensor], b: list[Tensor]) -> None:
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


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


@pytest.mark.parametrize("text", ["sam()", "esam()", "rwp()", "gsam()"])
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


@pytest.mark.parametrize("ascent", ["global", "local"])
@pytest.mark.parametrize("text", ["sam()", "gsam()", "esam()"])
def test_batch_norm_normalises_by_the_ranks_batch(text, ascent):
    """On one process, micro-batches are normalised each by itself too."""
    ends = launch(2, together, text, "convnet", ascent)
    model, _ = nets.convnet()
    opt = wrap(model, text if ascent == "global" else f"m_sharpness({text}, 6)")
    for step in range(STEPS):
        parts = [part(stream("convnet", step), rank, 2) for rank in range(2)]
        opt.step(steppe.Batch.from_micro_batches(model, nets.losses, parts))
    names = list(model.state_dict())
    for end in ends:
        for name, p, q in zip(names, end, weights(model), strict=True):
            if "running" not in name:  # rank 0's own survive, and each rank's are its own until the next step
                torch.testing.assert_close(p, q, rtol=0, atol=1e-9, msg=name)


def statistics(text: str | None, ascent: str) -> list[Tensor]:
    """Running statistics after some steps that do not move the weights; of torch's own loop where there is no text."""
    model, _ = nets.convnet()
    network = DistributedDataParallel(model)
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    opt = None if text is None else steppe.SharpnessAware(base, steppe.parse(text), ascent=ascent)
    for step in range(5):
        data = part(stream("convnet", step), dist.get_rank(), 2)
        if opt is None:
            base.zero_grad()
            nets.losses(network, data).mean().backward()
        else:
            opt.step(steppe.Batch(network, nets.losses, data))
    return [t.clone() for name, t in model.named_buffers()]


@pytest.mark.parametrize(
    ("text", "ascent"), [("sam(rho=0.5)", "global"), ("sam(rho=0.5)", "local"), ("esam()", "global")]
)
def test_statistics_move_as_in_torchs_own_loop(text, ascent):
    ours, plain = launch(2, statistics, text, ascent), launch(2, statistics, None, ascent)
    assert same(ours[0], plain[0]), "rank 0's survive"
    assert all(int(t) == 5 for end in ours for t in end if t.ndim == 0)


def synchronised(text: str) -> list[Tensor]:
    """Weights and statistics of a net with SyncBatchNorm, on one GPU that the ranks share."""
    model, _ = nets.convnet()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model).cuda()
    opt, network = wrap(model, text), DistributedDataParallel(model)
    for step in range(5):
        x, y = part(stream("convnet", step), dist.get_rank(), 2)
        opt.step(steppe.Batch(network, nets.losses, (x.cuda(), y.cuda())))
    return [t.cpu() for t in weights(model)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="SyncBatchNorm runs on GPUs only")
@pytest.mark.parametrize("text", ["sam()", "gsam()", "esam_swp()"])
def test_synchronised_batch_norm_is_one_process(text):
    ends = launch(2, synchronised, text)
    model, _ = nets.convnet()
    model.cuda()
    opt = wrap(model, text)
    for step in range(5):
        x, y = stream("convnet", step)
        opt.step(steppe.Batch(model, nets.losses, (x.cuda(), y.cuda())))
    assert same(*ends)
    for p, q in zip(ends[0], weights(model), strict=True):
        torch.testing.assert_close(p, q.cpu(), rtol=0, atol=1e-6)


def compiled(text: str, inside: bool, ascent: str) -> tuple[list[Tensor], int]:
    """Weights with ``torch.compile`` inside or around DDP, and how often it compiled after the third step."""
    model, _ = nets.transformer()
    opt, graphs = wrap(model, text, ascent=ascent), []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(len(graphs))
        return graph.forward

    network: Any = torch.compile(model, backend=backend) if inside else model
    network = DistributedDataParallel(network)
    network = network if inside else torch.compile(network, backend=backend)
    late = 0
    for step in range(STEPS):
        before = len(graphs)
        opt.step(steppe.Batch(network, nets.losses, part(stream("transformer", step), dist.get_rank(), 2)))
        late += len(graphs) - before if step >= 3 else 0
    assert graphs, "nothing was compiled"
    return weights(model), late


@pytest.mark.parametrize(("inside", "ascent"), [(True, "global"), (False, "local")])
def test_compiled_inside_and_around_ddp(inside, ascent):
    (first, late), (second, _) = launch(2, compiled, "sam()", inside, ascent)
    assert same(first, second)
    assert_close(first, alone("sam()" if ascent == "global" else "m_sharpness(sam(), 6)", "transformer"))
    assert late == 0


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
