"""Accelerate's loop beside the plain one and beside its own."""

from __future__ import annotations

import os
import runpy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, TensorDataset

import nets
import steppe
from ranks.launch import launch
from steppe.integrations.accelerate import AcceleratedSharpnessAware

ACCUMULATE, EPOCHS, CLIP = 3, 2, 0.5
SIZES = [4, 4, 4, 4, 2]
"""Sizes of the micro-batches of an epoch: two steps, of 12 examples and of 6."""
COUNT = sum(SIZES)

EXAMPLE = Path(__file__).parents[2] / "examples" / "accelerate_loop.py"

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh():
    """Accelerate keeps its settings for the whole process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def network(dropout=0.0):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Dropout(dropout), torch.nn.Linear(16, 3)]
        return torch.nn.Sequential(*layers)


def examples(count=COUNT):
    draw = torch.Generator().manual_seed(1)
    return torch.randn(count, 6, generator=draw), torch.randint(3, (count,), generator=draw)


def prepared(model, method, *, mixed=None, scaler=None, size=4, count=COUNT, sharded=False):
    """Return what a script has after ``accelerator.prepare``."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE, mixed_precision=mixed)
    if scaler is not None:  # which Accelerate makes for no CPU
        accelerator.native_amp, accelerator.scaler = True, scaler
    if sharded:  # which it allows on GPUs
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    base = torch.optim.AdamW(model.parameters(), lr=0.05)
    opt = AcceleratedSharpnessAware(steppe.SharpnessAware(base, method, clip=CLIP, total_steps=4), accelerator)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(base, 0.8)
    loader = DataLoader(TensorDataset(*examples(count)), batch_size=size)
    return accelerator, *accelerator.prepare(model, opt, loader, scheduler)


def run(accelerator, model, opt, loader, scheduler, epochs=EPOCHS):
    """Run the loop of the docs, and return the losses."""
    losses = []
    for _ in range(epochs):
        for data in loader:
            with accelerator.accumulate(model):
                losses.append(opt.step(steppe.Batch(model, nets.losses, data)))
                scheduler.step()
    return losses


def loop(model, method, *, autocast=None, scaler=None, epochs=EPOCHS):
    """Run the plain loop, and return its optimizer and the losses."""
    micro = list(zip(*(t.split(SIZES) for t in examples()), strict=True))
    base, losses = torch.optim.AdamW(model.parameters(), lr=0.05), []
    opt = steppe.SharpnessAware(base, method, clip=CLIP, scaler=scaler, total_steps=4)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(base, 0.8)
    for parts in [micro[:ACCUMULATE], micro[ACCUMULATE:]] * epochs:
        skipped = opt.stats.skipped
        losses.append(opt.step(steppe.Batch.from_micro_batches(model, nets.losses, parts, autocast=autocast)))
        if opt.stats.skipped == skipped:
            scheduler.step()
    return opt, losses


def far(one, other):
    return max(float((p - q).detach().abs().max()) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    "text",
    ["sgd()", "sam(0.2)", "esam(0.2)", "rwp(0.2)", "looksam(0.2, k=2)", "m_sharpness(sam(0.2), m=5)", "ssam(0.2)"],
)
def test_the_loop_is_the_plain_one(text):
    ours, plain = network(), network()
    accelerator, model, opt, loader, scheduler = prepared(ours, steppe.parse(text))
    losses = run(accelerator, model, opt, loader, scheduler)
    sharp, expected = loop(plain, steppe.parse(text))
    assert far(ours, plain) < 1e-6
    assert far(ours, network()) > 0.01
    assert [loss is None for loss in losses] == [True, True, False, True, False] * EPOCHS
    torch.testing.assert_close([loss for loss in losses if loss is not None], expected)
    assert opt.optimizer.stats == sharp.stats
    assert scheduler.scheduler.last_epoch == sharp.stats.steps == 4


def test_sgd_is_accelerates_own_loop():
    """With micro-batches of one size: Accelerate weighs them alike, whatever their sizes."""
    ours, plain = network(dropout=0.2), network(dropout=0.2)
    torch.manual_seed(0)
    run(*prepared(ours, steppe.sgd(), size=6))
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
    base = torch.optim.AdamW(plain.parameters(), lr=0.05)
    loader = DataLoader(TensorDataset(*examples()), batch_size=6)
    torch.manual_seed(0)
    model, base, loader, scheduler = accelerator.prepare(
        plain, base, loader, torch.optim.lr_scheduler.ExponentialLR(base, 0.8)
    )
    for _ in range(EPOCHS):
        for data in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nets.losses(model, data).mean())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                base.step()
                scheduler.step()
                base.zero_grad()
    assert far(ours, plain) < 1e-6


def test_both_passes_see_all_micro_batches_and_none_runs_for_nothing():
    for method, passes in ((steppe.sgd(), 1), (steppe.sam(), 2), (steppe.rwp(alpha=0), 1)):
        AcceleratorState._reset_state(True)
        model, seen = network(), []
        model.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        run(*prepared(model, method), epochs=1)
        x = examples()[0].split(SIZES)
        expected = [*x[:ACCUMULATE] * passes, *x[ACCUMULATE:] * passes]
        assert len(seen) == len(expected)
        assert all(torch.equal(one, other) for one, other in zip(seen, expected, strict=True))


def test_bf16_is_the_plain_loop():
    ours, plain = network(), network()
    run(*prepared(ours, steppe.sam(0.2), mixed="bf16"))
    loop(plain, steppe.sam(0.2), autocast=torch.bfloat16)
    assert far(ours, plain) < 1e-6
    single = network()
    loop(single, steppe.sam(0.2))
    assert far(ours, single) > 1e-4


@pytest.mark.parametrize("scale", [1024.0, 2.0**40])
def test_fp16_is_the_plain_loop_and_an_overflow_is_skipped(scale):
    ours, plain = network(), network()
    scalers = [torch.amp.GradScaler("cpu", init_scale=scale) for _ in range(2)]
    accelerator, model, opt, loader, scheduler = prepared(ours, steppe.sam(0.2), mixed="fp16", scaler=scalers[0])
    run(accelerator, model, opt, loader, scheduler)
    sharp, _ = loop(plain, steppe.sam(0.2), autocast=torch.float16, scaler=scalers[1])
    assert far(ours, plain) < 1e-6
    assert scalers[0].state_dict() == scalers[1].state_dict()
    assert opt.optimizer.stats == sharp.stats
    assert (sharp.stats.skipped > 0) == accelerator.optimizer_step_was_skipped == (scale > 1e6)
    assert scheduler.scheduler.last_epoch == sharp.stats.steps


@pytest.mark.parametrize("text", ["looksam(0.2, k=2)", "rst(rwp(0.2))", "ssam_dynamic(0.2)"])
def test_a_resumed_training_ends_at_the_same_bits(text, tmp_path):
    method = steppe.parse(text)
    whole, resumed = network(dropout=0.2), network(dropout=0.2)
    torch.manual_seed(0)
    script = prepared(whole, method)
    run(*script, epochs=1)
    script[0].save_state(str(tmp_path))
    run(*script, epochs=1)
    AcceleratorState._reset_state(True)
    again = prepared(resumed, method)
    again[0].load_state(str(tmp_path))
    run(*again, epochs=1)
    assert far(whole, resumed) == 0
    assert script[2].optimizer.stats == again[2].optimizer.stats
    assert script[4].scheduler.state_dict() == again[4].scheduler.state_dict()


@pytest.mark.parametrize("half", [False, True])
def test_accelerates_own_wrapper_is_refused(half):
    accelerator, model = Accelerator(cpu=True), network()
    if half:
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    sharp = steppe.SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), steppe.sam())
    model, opt = accelerator.prepare(model, sharp)
    accelerator.backward(nets.losses(model, examples()).mean())
    batch = [steppe.Batch(model, nets.losses, examples())] if half else []
    with pytest.raises(TypeError, match=r"steppe\.integrations"):
        opt.step(*batch)


def test_too_little_is_refused():
    model = network()
    accelerator, model, opt, _, _ = prepared(model, steppe.sam())
    with pytest.raises(TypeError, match=r"leave out accelerator\.backward"):
        opt.step(lambda: None)
    with pytest.raises(TypeError, match=r"steppe\.integrations"):
        opt.step()
    with pytest.raises(TypeError, match="optimizer is SGD"):
        AcceleratedSharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), accelerator)
    with accelerator.accumulate(model):
        opt.step(steppe.Batch(model, nets.losses, examples(4)))
    accelerator.gradient_state._set_sync_gradients(True)
    with pytest.raises(ValueError, match="differ in model or loss_fn"):
        opt.step(steppe.Batch(model, partial(nets.losses), examples(4)))


@pytest.mark.parametrize(
    ("state", "word"),
    [
        ({"distributed_type": DistributedType.DEEPSPEED}, "DEEPSPEED takes gradients"),
        ({"distributed_type": DistributedType.FSDP, "is_fsdp2": False}, "fsdp_version=2"),
        ({"parallelism_config": SimpleNamespace(non_data_parallel_size=2)}, "context"),
    ],
)
def test_what_cannot_work_is_refused(state, word):
    model = network()
    sharp = steppe.SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), steppe.sam())
    accelerator = SimpleNamespace(**{"distributed_type": DistributedType.NO, "scaler": None, **state})
    with pytest.raises(ValueError, match=word):
        AcceleratedSharpnessAware(sharp, accelerator)


def two_ranks(wrappers):
    """Run the loop on this rank, each with every second micro-batch of 2."""
    os.environ.update(RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    ends = []
    for wrapper in wrappers:
        AcceleratorState._reset_state(True)
        model = network()
        script = prepared(model, steppe.sam(0.2), size=2, count=24, sharded=wrapper == "FSDP2")
        _, wrapped, opt, loader, scheduler = script
        kind = {"DDP": torch.nn.parallel.DistributedDataParallel, "FSDP2": FSDPModule}[wrapper]
        assert isinstance(wrapped, kind)
        assert len(loader) == 6
        run(*script)
        assert opt.optimizer.stats.steps == 4
        ends.append([getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.parameters()])
        ends[-1].append(torch.tensor(scheduler.scheduler.last_epoch))
    return ends


def test_two_processes_are_one_with_the_whole_batch():
    first, second = launch(2, two_ranks, ["DDP", "FSDP2"], seconds=300.0)
    plain = network()
    base = torch.optim.AdamW(plain.parameters(), lr=0.05)
    opt = steppe.SharpnessAware(base, steppe.sam(0.2), clip=CLIP)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(base, 0.8)
    for data in list(zip(*(t.split(12) for t in examples(24)), strict=True)) * EPOCHS:
        opt.step(steppe.Batch(plain, nets.losses, data))
        for _ in range(2):  # as Accelerate does, once for every rank
            scheduler.step()
    expected = [*(p.detach() for p in plain.parameters()), torch.tensor(scheduler.last_epoch)]
    for ours, others in zip(first, second, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(ours, others, strict=True))
        assert max(float((p - q).abs().max()) for p, q in zip(ours, expected, strict=True)) < 1e-6


def test_the_example_runs(capsys):
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "accuracy" in capsys.readouterr().out
