"""Adapts a tiny Llama by Flat-LoRA: the adapters are trained at randomly perturbed merged weights.

python examples/flat_lora.py
"""

from __future__ import annotations

import math

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import steppe
from steppe.integrations.peft import flat_lora

VOCABULARY, LENGTH, STEPS = 17, 8, 60


def sequences(count: int, seed: int) -> Tensor:
    """Return sequences in which 3t + 1 follows t, shape (count, LENGTH)."""
    tokens = [torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))]
    for _ in range(LENGTH - 1):
        tokens.append((3 * tokens[-1] + 1) % VOCABULARY)
    return torch.stack(tokens, dim=1)


def loss_fn(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the mean cross entropy of each sequence's next tokens, shape (B,)."""
    logits = model(input_ids=tokens).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(dim=1)


def main() -> None:
    """Train the adapters for 60 steps, and print the loss before and after."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
    )
    adapters = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", modules_to_save=["lm_head"])
    model = get_peft_model(LlamaForCausalLM(config), adapters)
    trained = [p for p in model.parameters() if p.requires_grad]
    opt = steppe.SharpnessAware(torch.optim.AdamW(trained, lr=0.02), steppe.sgd(), clip=1.0)
    held_out = sequences(64, seed=1)
    before = loss_fn(model, held_out).mean().item()
    for step in range(STEPS):
        sigma = 0.05 * (1 - math.cos(math.pi * step / STEPS)) / 2
        with flat_lora(model, opt, sigma):
            opt.step(steppe.Batch(model, loss_fn, sequences(32, seed=2 + step)))
    after = loss_fn(model, held_out).mean().item()
    print(f"{opt.stats.steps} steps, loss {before:.3f} before and {after:.3f} after")


if __name__ == "__main__":
    main()
