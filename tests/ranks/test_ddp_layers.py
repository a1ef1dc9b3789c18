"""What may stand around or inside of DDP: normalisation by the batch, and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import nets
import steppe
from ddp_work import STEPS, alone, assert_close, part, stream, together, wrap
from launch import launch
from recipes_list import same, weights


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
