"""Two tiny language models from a config, synthetic token sequences of unequal length, and a Trainer of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    TrainingArguments,
)

from steppe.integrations.transformers import SharpnessAwareTrainer

VOCABULARY, LENGTH, CLASSES = 32, 6, 3
COUNT, SIZE, ACCUMULATE, EPOCHS, CLIP = 22, 4, 2, 2, 0.5
"""Five micro-batches of 4 and one of 2: the last step of an epoch is made of unequal ones."""
Inputs = dict[str, Tensor]


def llama(dropout: float = 0.0, seed: int = 0) -> LlamaForCausalLM:
    """One block of width 16, untied head; its loss is normalised by tokens."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=LENGTH,
        attention_dropout=dropout,
        attn_implementation="eager",
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).train()


def bert(dropout: float = 0.0, seed: int = 0) -> BertForSequenceClassification:
    """One block of width 16; its loss is a mean over examples."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=CLASSES,
        attn_implementation="eager",
    )
    torch.manual_seed(seed)
    return BertForSequenceClassification(config).train()


class Texts(Dataset[Inputs]):
    """``count`` random sequences for the model; labels are tokens, -100 beyond a random length, or classes."""

    def __init__(self, model: PreTrainedModel, count: int) -> None:
        draw = torch.Generator().manual_seed(1)
        tokens = torch.randint(VOCABULARY, (count, LENGTH), generator=draw)
        lengths = torch.randint(2, LENGTH + 1, (count, 1), generator=draw)
        inside = torch.arange(LENGTH) < lengths
        labels = torch.randint(CLASSES, (count,), generator=draw)
        if model.config.model_type == "llama":
            labels = tokens.where(inside, -100)
        self.columns = {"input_ids": tokens, "attention_mask": inside.long(), "labels": labels}

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, i: int) -> Inputs:
        return {name: column[i] for name, column in self.columns.items()}

    def batches(self, size: int) -> list[Inputs]:
        """Return all examples in their order, in batches."""
        return [
            {name: column[i : i + size] for name, column in self.columns.items()} for i in range(0, len(self), size)
        ]


def weights(model: torch.nn.Module) -> list[Tensor]:
    """Return copies of all parameters."""
    return [p.detach().clone() for p in model.parameters()]


def far(u: list[Tensor], v: list[Tensor]) -> float:
    """Return the largest difference of two entries."""
    return max(float((a - b).abs().max()) for a, b in zip(u, v, strict=True))


class InOrder:
    """Takes the examples as they stand."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Sharp(InOrder, SharpnessAwareTrainer):
    pass


def arguments(folder, kind=TrainingArguments, **other):
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": SIZE,
        "gradient_accumulation_steps": ACCUMULATE,
        "num_train_epochs": EPOCHS,
        "learning_rate": 0.02,
        "max_grad_norm": CLIP,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    return kind(**{**settings, **other})


def trainer_of(cls, model, folder, **other):
    more = {name: other.pop(name) for name in ("method", "ascent", "compute_loss_func") if name in other}
    texts = Texts(model, other.pop("count", COUNT))
    return cls(model=model, args=arguments(folder, **other), train_dataset=texts, **more)


def train(cls, model, folder, resume=None, **other):
    trainer = trainer_of(cls, model, folder, **other)
    trainer.train(resume_from_checkpoint=resume)
    return trainer
