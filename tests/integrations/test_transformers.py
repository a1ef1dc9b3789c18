"""The Trainer with a sharpness-aware step: beside the stock Trainer, a plain loop, and itself resumed."""

from __future__ import annotations

import gc
import os
import runpy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, get_scheduler

import steppe
from ranks.launch import launch
from steppe.integrations.transformers import SharpnessAwareTrainer
from tiny_language import (
    ACCUMULATE,
    CLIP,
    COUNT,
    EPOCHS,
    SIZE,
    InOrder,
    Sharp,
    Texts,
    arguments,
    bert,
    far,
    llama,
    train,
    trainer_of,
    weights,
)

SGD = {"optim": "sgd", "learning_rate": 0.5}
"""AdamW, the default, would blow the rounding of small gradients up."""

EXAMPLE = Path(__file__).parents[2] / "examples" / "trainer.py"

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def quick():
    """The Trainer collects garbage at its start, which takes longer than the training: there are many modules."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Stock(InOrder, Trainer):
    pass


class Half(Sharp):
    """fp16 on the CPU, which Accelerate gives no scaler."""

    scale = 1024.0

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.scale)


def logged(trainer):
    """What was logged at every step."""
    names = ("loss", "grad_norm", "learning_rate", "step")
    return torch.tensor([[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry])


def token_loss(items, total):
    """The sum over tokens divided by those of the step, times what undoes the weight of a micro-batch."""

    def loss_fn(model, data):
        if torch.is_autocast_enabled("cpu"):  # whose roundings are only those of the same operations
            return model(**data, num_items_in_batch=items).loss * (total / len(data["labels"]))
        logits = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits.float()
        each = F.cross_entropy(logits[:, :-1].transpose(1, 2), data["labels"][:, 1:], reduction="sum")
        return each / items * (total / len(data["labels"]))

    return loss_fn


def sgd(model):
    """The groups are the Trainer's: what is drawn for a parameter depends on its place."""
    groups = {False: [], True: []}
    for name, p in model.named_parameters():
        groups["bias" in name or "norm" in name.lower()].append(p)
    return torch.optim.SGD([{"params": params} for params in groups.values()], lr=SGD["learning_rate"])


def loop(model, method, autocast=None, scaler=None, accumulate=ACCUMULATE):
    """The plain loop that the Trainer is compared with."""
    micro = Texts(model, COUNT).batches(SIZE)
    steps = [micro[i : i + accumulate] for i in range(0, len(micro), accumulate)]
    length = EPOCHS * len(steps)
    base = sgd(model)
    opt = steppe.SharpnessAware(base, method, clip=CLIP, scaler=scaler, seed=42, total_steps=length)
    scheduler = get_scheduler("linear", opt, num_warmup_steps=0, num_training_steps=length)
    for parts in steps * EPOCHS:
        items = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)
        loss_fn = token_loss(items, sum(len(part["labels"]) for part in parts))
        skipped = opt.stats.skipped
        opt.step(steppe.Batch.from_micro_batches(model, loss_fn, parts, autocast=autocast))
        if opt.stats.skipped == skipped:
            scheduler.step()
    return opt


@pytest.mark.parametrize(
    ("net", "other"),
    [
        (llama, {}),
        (bert, {}),
        (llama, {"label_smoothing_factor": 0.1}),
        (llama, {"bf16": True, "gradient_checkpointing": True}),
        (llama, {"max_grad_norm": -1.0}),
        (llama, {"max_grad_norm": 0.0}),
    ],
    ids=["llama", "bert", "smoothing", "bf16", "clip off", "no clip"],
)
def test_sgd_is_the_stock_trainer(net, other, tmp_path):
    ends = []
    for cls, more in ((Stock, {}), (Sharp, {"method": steppe.sgd()})):
        model = net(dropout=0.1)
        trainer = train(cls, model, tmp_path, **other, **more)
        ends.append((weights(model), logged(trainer), trainer.state.global_step))
    (stock, log, steps), (ours, our_log, our_steps) = ends
    assert far(stock, ours) < 1e-6
    assert torch.allclose(log, our_log, rtol=1e-5, atol=0)
    assert steps == our_steps == 6
    assert log[:, 1].max() > CLIP


def test_a_mean_loss_is_averaged_over_the_micro_batches_as_in_the_stock_trainer(tmp_path):
    ends = []
    for cls, more in ((Stock, {}), (Sharp, {"method": steppe.sgd()})):
        model = bert()
        model.accepts_loss_kwargs = False
        trainer = train(cls, model, tmp_path, **more)
        ends.append((weights(model), logged(trainer)))
    assert far(ends[0][0], ends[1][0]) < 1e-6
    assert torch.allclose(ends[0][1], ends[1][1], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "text",
    [
        "sam(0.2)",
        "esam_swp(0.2)",
        "rwp(0.2)",
        "rwp(0.2, alpha=0)",
        "looksam(0.2, k=2)",
        "rst(gsam(0.2))",
        "rst(sam(0.2), cosine())",
    ],
)
def test_the_trainer_is_the_plain_loop(text, tmp_path):
    ours, plain = llama(), llama()
    trainer = train(Sharp, ours, tmp_path, method=steppe.parse(text), **SGD)
    opt = loop(plain, steppe.parse(text))
    assert far(weights(ours), weights(plain)) < 1e-6
    assert far(weights(ours), weights(llama())) > 0.01
    assert trainer.sharpness.stats == opt.stats
    assert trainer.state.global_step == opt.stats.steps == 6


def test_both_passes_see_all_micro_batches_and_none_runs_for_nothing(tmp_path):
    for method, passes in ((steppe.sgd(), 1), (steppe.sam(), 2), (steppe.rwp(alpha=0), 1)):
        model, seen, backward = llama(), [], []
        model.register_forward_pre_hook(
            lambda _, __, inputs, seen=seen: seen.append(inputs["labels"]), with_kwargs=True
        )
        model.lm_head.weight.register_post_accumulate_grad_hook(lambda _, backward=backward: backward.append(1))
        train(Sharp, model, tmp_path, method=method, max_steps=1)
        micro = [batch["labels"] for batch in Texts(model, COUNT).batches(SIZE)[:ACCUMULATE]]
        assert [each.tolist() for each in seen] == [each.tolist() for each in micro * passes]
        assert len(backward) == passes * ACCUMULATE


def test_bf16_is_the_plain_loop(tmp_path):
    ours, plain = llama(), llama()
    train(Sharp, ours, tmp_path, method=steppe.sam(0.2), bf16=True, **SGD)
    loop(plain, steppe.sam(0.2), autocast=torch.bfloat16)
    assert far(weights(ours), weights(plain)) < 1e-6


@pytest.mark.parametrize("scale", [1024.0, 2.0**40])
def test_fp16_is_the_plain_loop_and_an_overflow_is_skipped(scale, tmp_path):
    ours, plain = llama(), llama()
    Half.scale = scale
    trainer = train(Half, ours, tmp_path, method=steppe.sam(0.2), fp16=True, **SGD)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    opt = loop(plain, steppe.sam(0.2), autocast=torch.float16, scaler=scaler)
    assert far(weights(ours), weights(plain)) < 1e-6
    assert trainer.accelerator.scaler.state_dict() == scaler.state_dict()
    assert trainer.sharpness.stats == opt.stats
    assert trainer.state.global_step == opt.stats.steps + opt.stats.skipped == 6
    assert trainer.lr_scheduler.last_epoch == opt.stats.steps
    assert (opt.stats.skipped > 0) == (scale > 1e6)
    assert all(p.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("text", ["looksam(0.2, k=2)", "rst(rwp(0.2))", "ssam_dynamic(0.2)"])
def test_a_resumed_training_ends_at_the_same_bits(text, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "cosine"}
    whole, resumed = bert(dropout=0.2), bert(dropout=0.2, seed=1)
    first = train(Sharp, whole, tmp_path / "a", method=steppe.parse(text), **saving)
    again = train(
        Sharp, resumed, tmp_path / "b", method=steppe.parse(text), resume=str(tmp_path / "a" / "checkpoint-3"), **saving
    )
    assert far(weights(whole), weights(resumed)) == 0
    assert torch.equal(logged(first), logged(again))
    assert first.sharpness.stats == again.sharpness.stats
    first.save_model(str(tmp_path / "model"))
    loaded = type(whole).from_pretrained(tmp_path / "model")
    assert far(weights(whole), weights(loaded)) == 0
    with pytest.raises(ValueError, match=r"saved by .*runs sam\(\)"):
        train(Sharp, bert(), tmp_path / "c", method=steppe.sam(), resume=str(tmp_path / "a" / "checkpoint-3"), **saving)


def test_labels_are_there_in_the_second_pass_too(tmp_path):
    """Label smoothing and compute_loss_func take them out of the inputs."""

    def loss(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    for other in ({"label_smoothing_factor": 0.1}, {"compute_loss_func": loss}):
        trainer = train(Sharp, bert(), tmp_path, method=steppe.sam(), **other)
        assert trainer.sharpness.stats.sharp == 6


def test_a_method_that_looks_at_examples_gets_their_losses(tmp_path):
    def each(outputs, labels, num_items_in_batch=None):
        assert num_items_in_batch is None
        return F.cross_entropy(outputs.logits, labels, reduction="none")

    def loss_fn(model, data):
        return F.cross_entropy(
            model(data["input_ids"], data["attention_mask"]).logits, data["labels"], reduction="none"
        )

    method = steppe.esam(0.2)
    ours, plain = bert(), bert()
    train(Sharp, ours, tmp_path, method=method, compute_loss_func=each, lr_scheduler_type="constant", **SGD)
    opt = steppe.SharpnessAware(sgd(plain), method, clip=CLIP, seed=42)
    micro = Texts(plain, COUNT).batches(SIZE)
    for i in [*range(0, len(micro), ACCUMULATE)] * EPOCHS:
        opt.step(steppe.Batch.from_micro_batches(plain, loss_fn, micro[i : i + ACCUMULATE]))
    assert far(weights(ours), weights(plain)) < 1e-6
    with pytest.raises(TypeError, match=r"loss of each example.*shape \(B,\)"):
        train(Sharp, bert(), tmp_path, method=method)


def test_groups_of_examples_share_the_tokens_of_the_step(tmp_path):
    """m_sharpness of radius 0 in groups that cut the micro-batches is the stock Trainer."""
    for net in (llama, bert):
        stock, ours = net(), net()
        for model in (stock, ours):
            model.accepts_loss_kwargs = net is llama
        train(Stock, stock, tmp_path)
        train(Sharp, ours, tmp_path, method=steppe.m_sharpness(steppe.sam(1e-9), m=3))
        assert far(weights(stock), weights(ours)) < 1e-5


@pytest.mark.parametrize("half", [False, True])
def test_the_stock_trainer_with_a_sharp_optimizer_is_refused(half, tmp_path):
    model = llama()
    opt = steppe.SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), steppe.sam())
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=Texts(model, COUNT), optimizers=(opt, None))
    if half:
        trainer.accelerator.native_amp, trainer.accelerator.scaler = True, torch.amp.GradScaler("cpu")
    before = weights(model)
    with pytest.raises(TypeError, match=r"steppe\.integrations"):
        trainer.train()
    assert far(before, weights(model)) == 0


def test_a_training_step_that_takes_no_step_is_refused(tmp_path):
    class Own(Sharp):
        training_step = Trainer.training_step

    with pytest.raises(TypeError, match=r"steppe\.integrations"):
        train(Own, llama(), tmp_path, method=steppe.sam())


def test_another_trainer_by_inheritance(tmp_path):
    class Sharp2(InOrder, SharpnessAwareTrainer, Seq2SeqTrainer):
        pass

    ours, plain = llama(), llama()
    train(Sharp2, ours, tmp_path, method=steppe.sam(0.2), kind=Seq2SeqTrainingArguments, **SGD)
    loop(plain, steppe.sam(0.2))
    assert far(weights(ours), weights(plain)) < 1e-6


def test_data_parallel_is_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="torchrun"):
        SharpnessAwareTrainer(model=llama(), args=args, method=steppe.sam())


def test_training_twice_goes_on(tmp_path):
    trainer = trainer_of(Sharp, llama(), tmp_path, method=steppe.sam())
    trainer.train()
    trainer.train()
    assert trainer.sharpness.stats.steps == 12


def two_ranks(folder, arguments):
    """Train on this rank, which gets every second micro-batch."""
    os.environ.update(RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    ends = []
    for more in arguments:
        model = llama()
        trainer = train(Sharp, model, folder, method=steppe.sam(0.2), **more)
        assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
        ends.append((weights(model), logged(trainer)))
    return ends


def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    half = {"count": 24, "per_device_train_batch_size": 2, **SGD}
    runs = [half, {**half, "ascent": "local"}]
    first, second = launch(2, two_ranks, str(tmp_path), runs, seconds=300.0)
    for (ours, log), (others, other_log) in zip(first, second, strict=True):
        assert far(ours, others) == 0
        assert torch.equal(log, other_log)
    (ours, log), (local, _) = first
    model = llama()
    whole = train(Sharp, model, tmp_path, method=steppe.sam(0.2), gradient_accumulation_steps=4, **half)
    assert far(ours, weights(model)) < 1e-6
    assert torch.allclose(log, logged(whole), rtol=1e-5, atol=0)
    assert far(ours, local) > 1e-3


def test_the_example_runs(capsys):
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("method", [steppe.sam(), steppe.esam_sds(gamma=1.0)], ids=["sam", "esam"])
def test_losses_of_examples_count_the_same_on_any_number_of_ranks(tmp_path, monkeypatch, method):
    """The Trainer multiplies by the number of ranks, for losses that are sums over the tokens of all of them."""
    ends = []
    for ranks in (1, 2):
        model = bert()
        trainer = trainer_of(Sharp, model, tmp_path, method=method, compute_loss_func=each_loss)
        monkeypatch.setattr(type(trainer), "get_tp_size", lambda self, ranks=ranks: 1 / ranks)
        trainer.train()
        ends.append(weights(model))
    assert far(*ends) < 1e-6


def each_loss(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits, labels, reduction="none")
