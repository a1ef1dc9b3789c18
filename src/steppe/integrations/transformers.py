"""Hugging Face transformers: a ``Trainer`` whose step is sharpness-aware."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from transformers import Trainer

from ..batch import Batch
from ..examples import extent
from ..method import Method
from ..rounding import Rounding
from ..step import SharpnessAware
from .accelerate import AcceleratedSharpnessAware


class SharpnessAwareTrainer(Trainer):
    """``transformers.Trainer`` with a sharpness-aware step around the optimizer that its arguments name.

    Accumulation, mixed precision, clipping, data parallelism, checkpoints and schedules are those of the ``Trainer``.
    Both passes span all micro-batches of a step, and the loss is the ``Trainer``'s own, ``num_items_in_batch``
    included. For another trainer, inherit from both: ``class Sharp(SharpnessAwareTrainer, Seq2SeqTrainer)``.

    The step is taken in ``training_step`` on the last micro-batch, so the callbacks ``on_pre_optimizer_step`` and
    ``on_optimizer_step`` both come after it, with its direction in ``.grad``.

    Methods that look at the losses of single examples (ESAM) need a ``compute_loss_func`` that returns one loss an
    example, shape (B,). They are averaged over the examples: ``num_items_in_batch`` is None then.

    ``trainer.sharpness`` is the ``SharpnessAware`` of the training that runs or ran, with its ``stats``.

    Args:
        *args: as for ``Trainer``.
        method: what the step does: ``steppe.sam()`` and its like.
        ascent: as for ``SharpnessAware``. Default "global".
        rounding: as for ``SharpnessAware``. Default "stochastic".
        **kwargs: as for ``Trainer``. ``args.seed`` is also the seed of all that the method draws.

    Raises:
        ValueError: if the model would be trained by ``DataParallel``, DeepSpeed, Megatron-LM, XLA or FSDP1.

    Cost:
        ``method.cost()`` propagations a step. The inputs of one step's micro-batches are kept until it is taken.
    """

    def __init__(
        self,
        *args: Any,
        method: Method,
        ascent: Literal["global", "local"] = "global",
        rounding: Rounding = "stochastic",
        **kwargs: Any,
    ) -> None:
        self.method, self.ascent, self.rounding = method, ascent, rounding
        self._norm: Tensor | None = None
        self._waiting: list[tuple[dict[str, Any], Any, int]] = []
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError("DataParallel hides the ranks from the step: start the script by torchrun, one GPU a rank")

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator; its clipping is left to the step, which clips once and before the base steps."""
        super().create_accelerator_and_postprocess()
        self.accelerator.clip_grad_norm_ = lambda *_, **__: self._norm

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """Create the ``Trainer``'s own optimizer and wrap it."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if not isinstance(optimizer, _Taken):
            self.sharpness = SharpnessAware(
                optimizer,
                self.method,
                ascent=self.ascent,
                rounding=self.rounding,
                clip=self._clip,
                seed=self.args.seed,
                total_steps=1,  # create_scheduler is told the length
            )
            optimizer = self.optimizer = _Taken(self.sharpness, self.accelerator)
        self._waiting.clear()
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
        """Create the schedule of the learning rate, and tell the method the length of the training."""
        self.sharpness.total_steps = num_training_steps
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Keep the micro-batch, and take the step if it is the last one.

        Returns:
            The loss of the whole step on its last micro-batch, and 0 on the others: the ``Trainer`` adds them up.
        """
        model.train()
        inputs = self._prepare_inputs(inputs)
        self._waiting.append((inputs, num_items_in_batch, extent(inputs)[0]))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        waiting, self._waiting = self._waiting, []
        count, total = len(waiting), sum(size for _, _, size in waiting)

        def loss_fn(model: nn.Module, data: tuple[dict[str, Any], Any, int]) -> Tensor:
            """Return the ``Trainer``'s loss times what undoes the weight B_i/B that a step gives a micro-batch."""
            inputs, items, size = data
            items = None if self.method.select else items
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, dict(inputs), num_items_in_batch=items)
            assert isinstance(loss, Tensor)
            if loss.ndim:  # the mean is the step's; compute_loss has made up for a sum that is divided on each rank
                ranks = self.accelerator.num_processes // self.get_tp_size()
                return loss / ranks if items is not None and self.args.average_tokens_across_devices else loss
            return loss * (total / (extent(inputs)[0] if self._is_share(items) else size * count))

        self._norm = None
        assert isinstance(self.optimizer, _Taken)
        return self.optimizer._take(Batch.from_micro_batches(model, loss_fn, waiting))

    def _is_share(self, items: Tensor | int | None) -> bool:
        """Whether ``compute_loss`` returns a micro-batch's share of the step's loss, and not the mean over it."""
        said = getattr(self, "loss_is_scaled_for_ga", None)
        if said is not None:
            return bool(said)
        return (self.model_accepts_loss_kwargs and items is not None) or self.compute_loss_func is not None

    def _clip(self, params: list[Tensor]) -> None:
        """Clip the direction, and keep its norm for the log."""
        limit = self.args.max_grad_norm
        self._norm = clip_grad_norm_(params, limit if limit and limit > 0 else math.inf)


class _Taken(AcceleratedSharpnessAware):
    """The optimizer of the ``Trainer``'s loop, which asks for a step that ``training_step`` has taken already."""

    _taken = False

    def _take(self, batch: Batch) -> Tensor:
        loss = super()._take(batch)
        self._taken = True
        return loss

    def step(self, closure: Batch | None = None) -> None:
        """Do nothing; or refuse, where another ``training_step`` took no step."""
        if not self._taken:
            super().step(closure)
        self._taken = False
