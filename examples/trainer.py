"""Trains a tiny Llama with SAM by transformers' Trainer, on sequences whose next token follows from the last.

python examples/trainer.py
"""

from __future__ import annotations

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import steppe
from steppe.integrations.transformers import SharpnessAwareTrainer

VOCABULARY, LENGTH = 17, 8


def sequences(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Return sequences in which 3t + 1 follows t."""
    tokens = [torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))]
    for _ in range(LENGTH - 1):
        tokens.append((3 * tokens[-1] + 1) % VOCABULARY)
    return [{"input_ids": row, "labels": row} for row in torch.stack(tokens, dim=1)]


def main() -> None:
    """Train for 40 steps of 4 micro-batches, and print the accuracy."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
    )
    model = LlamaForCausalLM(config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=4,
            learning_rate=0.01,
            max_steps=40,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = SharpnessAwareTrainer(
            model=model, args=arguments, train_dataset=sequences(512, seed=0), method=steppe.sam(rho=0.05)
        )
        trainer.train()
    model.eval()
    tokens = torch.stack([row["labels"] for row in sequences(64, seed=1)]).to(model.device)
    with torch.no_grad():
        correct = model(tokens).logits[:, :-1].argmax(-1) == tokens[:, 1:]
    print(f"{trainer.sharpness.stats.steps} steps, accuracy {correct.float().mean():.3f}")


if __name__ == "__main__":
    main()
