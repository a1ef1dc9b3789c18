"""LoRA: adapters alone are perturbed, or the merged weights by seeded noise."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import nets
import steppe
from steppe.integrations.peft import flat_lora
from tiny_language import Sharp, far, llama, train, weights

EXAMPLE = Path(__file__).parents[2] / "examples" / "flat_lora.py"
SIGMA, LR = 0.1, 0.5


def adapted(model, *targets, dropout=0.0):
    """Return the model with adapters of rank 2 and scale 4, whose B is not 0 as it is at the start of a training."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        config = LoraConfig(
            r=2, lora_alpha=8, target_modules=list(targets), lora_dropout=dropout, init_lora_weights=False
        )
        return get_peft_model(model, config)


def mlp(dropout=0.0):
    """The float64 network of the other tests, adapted in two of its three layers."""
    model, data = nets.mlp()
    return adapted(model, "0", "2", dropout=dropout), data


def frozen(model):
    return [p.detach().clone() for p in model.parameters() if not p.requires_grad]


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def sharp(model, method, **options):
    return steppe.SharpnessAware(torch.optim.SGD(trained(model), lr=LR), method, **options)


def base_weights(model):
    return [m.get_base_layer().weight for m in model.modules() if isinstance(m, LoraLayer)]


def test_sam_perturbs_the_adapters_alone():
    model, data = mlp()
    opt, home, moves = sharp(model, steppe.sam(0.3)), weights(model), []

    def losses(model, batch):
        moves.append([p.detach() - q for p, q in zip(model.parameters(), home, strict=True)])
        return nets.losses(model, batch)

    before = frozen(model)
    opt.step(steppe.Batch(model, losses, data))
    first, second = moves
    assert all(move.abs().max() == 0 for move in first)
    adapters = [move for move, p in zip(second, model.parameters(), strict=True) if p.requires_grad]
    assert len(adapters) == 4
    assert torch.linalg.vector_norm(torch.cat([move.flatten() for move in second])).item() == pytest.approx(0.3)
    assert torch.linalg.vector_norm(torch.cat([move.flatten() for move in adapters])).item() == pytest.approx(0.3)
    assert far(before, frozen(model)) == 0


def test_the_trainer_takes_adapters(tmp_path):
    """A Llama under peft: its token normalisation is that of the model inside."""
    model = adapted(llama(), "q_proj", "v_proj")
    before = frozen(model)
    start = weights(model)
    trainer = train(Sharp, model, tmp_path, method=steppe.sam(0.2))
    assert trainer.sharpness.stats.sharp == 6
    assert len(trainer.sharpness.trainable()) == 4
    assert far(before, frozen(model)) == 0
    assert far(start, weights(model)) > 0.01


def noise(opt, shape):
    """Normal numbers from the generator that the step has for this purpose."""
    point = opt._point([], 0)
    return torch.randn(shape, dtype=torch.float64, generator=point.generator("flat_lora"))


def test_flat_lora_is_the_papers_formula():
    """One layer, the adapters' gradients through a merged weight that is written out."""
    (x, y), draw = nets.data(6), torch.Generator().manual_seed(3)
    layer = nn.Linear(6, nets.CLASSES, bias=False).double()
    torch.nn.init.normal_(layer.weight, generator=draw)
    model = adapted(nn.Sequential(layer), "0")
    opt = sharp(model, steppe.sgd(), seed=5)
    w = layer.weight.detach().clone()
    a, b = (p.detach().clone().requires_grad_() for p in trained(model))
    for step in range(5):
        merged = w + 4 * (b @ a).detach()
        eps = noise(opt, w.shape) * SIGMA * merged.square().sum(1, keepdim=True).sqrt() / 6**0.5
        slopes = torch.autograd.grad(F.cross_entropy(x @ (w + eps + 4 * b @ a).T, y), [a, b])
        with flat_lora(model, opt, SIGMA):
            loss = opt.step(steppe.Batch(model, nets.losses, (x, y)))
        with torch.no_grad():
            for p, g in zip([a, b], slopes, strict=True):
                p -= LR * g
        assert torch.isfinite(loss)
        assert opt.stats.steps == opt.stats.propagations * (step + 1) == step + 1
    assert far([a.detach(), b.detach()], [p.detach() for p in trained(model)]) < 1e-10
    assert torch.equal(w, layer.weight)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv"])
def test_the_noise_has_the_deviation_of_the_merged_rows(kind):
    """And not of the frozen ones: W is 0 here, so that all comes from the adapters."""
    layer = {"linear": nn.Linear(400, 5), "conv1d": Conv1D(5, 400), "conv": nn.Conv2d(16, 5, 5)}[kind]
    nn.init.zeros_(layer.weight)
    model = adapted(nn.Sequential(layer), "0")
    opt = sharp(model, steppe.sgd())
    (lora,) = [m for m in model.modules() if isinstance(m, LoraLayer)]
    with torch.no_grad():
        for row, b in enumerate(lora.lora_B["default"].weight):
            b.mul_(2**row)
    rows = 1 if kind == "conv1d" else 0
    merged = lora.get_delta_weight("default").detach().transpose(0, rows).flatten(1)
    with flat_lora(model, opt, SIGMA):
        eps = layer.weight.detach().clone().transpose(0, rows).flatten(1)
    assert layer.weight.abs().max() == 0
    ratio = eps.norm(dim=1) / merged.norm(dim=1)
    torch.testing.assert_close(ratio, torch.full((5,), SIGMA), rtol=0.15, atol=0)
    assert eps.mean().abs() < 4 * eps.std() / eps.numel() ** 0.5


def test_noise_is_a_function_of_seed_and_step():
    model, _ = mlp()
    seen = []
    for seed, steps in ((0, 2), (0, 1), (1, 1)):
        opt = sharp(copy.deepcopy(model), steppe.sgd(), seed=seed)
        fresh = copy.deepcopy(model)
        state = torch.get_rng_state()
        for _ in range(steps):
            with flat_lora(fresh, opt, SIGMA):
                seen.append([w.detach().clone() for w in base_weights(fresh)])
            opt.stats.steps += 1
        assert torch.equal(state, torch.get_rng_state())
    first, second, same, other = seen
    assert far(first, same) == 0
    assert far(first, second) > 1e-3
    assert far(first, other) > 1e-3


def test_every_layer_has_noise_of_its_own():
    one = nn.Linear(4, 4)
    model = nn.Sequential(one, copy.deepcopy(one))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["0", "1"]))
    with flat_lora(model, sharp(model, steppe.sgd()), SIGMA):
        first, second = base_weights(model)
        assert not torch.equal(first, second)


def test_every_pass_sees_the_noise_and_the_weights_come_back_to_the_bit():
    model, data = mlp(dropout=0.2)
    before, seen = frozen(model), []

    def losses(model, batch):
        seen.append(frozen(model))
        return nets.losses(model, batch)

    opt = sharp(model, steppe.sam(0.1))
    with flat_lora(model, opt, SIGMA):
        opt.step(steppe.Batch(model, losses, data, micro=2))
    assert len(seen) == 4
    assert all(far(each, seen[0]) == 0 for each in seen)
    assert far(seen[0], before) > 1e-3
    assert far(before, frozen(model)) == 0
    with pytest.raises(KeyboardInterrupt), flat_lora(model, opt, SIGMA):
        raise KeyboardInterrupt
    assert far(before, frozen(model)) == 0


def test_bf16_weights_come_back_to_the_bit():
    model = adapted(llama().bfloat16(), "q_proj", "lm_head")
    before = frozen(model)
    with flat_lora(model, sharp(model, steppe.sgd()), SIGMA):
        assert far(before, frozen(model)) > 1e-3
    assert all(torch.equal(p, q) for p, q in zip(before, frozen(model), strict=True))


def test_radius_zero_is_lora():
    ends = []
    for sigma in (0.0, None):
        model, data = mlp()
        opt = sharp(model, steppe.sam(0.1))
        for _ in range(3):
            batch = steppe.Batch(model, nets.losses, data)
            if sigma is None:
                opt.step(batch)
            else:
                with flat_lora(model, opt, sigma):
                    opt.step(batch)
        ends.append(weights(model))
    assert far(*ends) == 0


def test_flat_lora_in_the_trainer(tmp_path):
    """The override that the docs show; a resumed training draws the same noise."""

    class Flat(Sharp):
        def training_step(self, *args, **kwargs):
            with flat_lora(self.model, self.sharpness, SIGMA):
                return super().training_step(*args, **kwargs)

    saving = {"save_strategy": "steps", "save_steps": 1, "method": steppe.sgd()}
    whole, resumed, plain = (adapted(llama(), "q_proj", "v_proj", dropout=0.1) for _ in range(3))
    before = frozen(whole)
    train(Flat, whole, tmp_path / "a", **saving)
    train(Flat, resumed, tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-3"), **saving)
    train(Sharp, plain, tmp_path / "c", **saving)
    assert far(before, frozen(whole)) == 0
    assert far(weights(whole), weights(resumed)) == 0
    assert far(weights(whole), weights(plain)) > 1e-4


def test_what_cannot_be_perturbed_is_refused():
    model, _ = mlp()
    opt = sharp(model, steppe.sgd())
    with pytest.raises(ValueError, match="sigma=-1"), flat_lora(model, opt, -1.0):
        pass
    with pytest.raises(ValueError, match="no LoRA adapter"), flat_lora(nets.mlp()[0], opt):
        pass
    embedded = adapted(nn.Sequential(nn.Embedding(4, 4)), "0")
    with pytest.raises(ValueError, match="of type Embedding"), flat_lora(embedded, opt):
        pass
    before = frozen(model)
    last = [m for m in model.modules() if isinstance(m, LoraLayer)][-1]
    last.get_base_layer = lambda: SimpleNamespace(weight=torch.zeros(8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="quantised or sharded"), flat_lora(model, opt):
        pass
    assert far(before, frozen(model)) == 0


def test_the_example_runs(capsys):
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "60 steps" in capsys.readouterr().out
