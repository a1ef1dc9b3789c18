"""Hugging Face Accelerate: one step over all micro-batches of ``accelerator.accumulate``."""

from __future__ import annotations

from accelerate import Accelerator, DistributedType
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from ..batch import Batch
from ..step import SharpnessAware

_OWN_LOOP = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)


class AcceleratedSharpnessAware(AcceleratedOptimizer):  # type: ignore[misc]
    """``SharpnessAware`` in Accelerate's loop: ``accelerator.prepare`` takes it as it is.

    Every micro-batch is handed to ``step``. The one that completes a step (``accelerator.sync_gradients``) runs it:
    both passes span all micro-batches since the last step, ``L = Σ (B_i/B) mean_i``. Mixed precision is that of the
    accelerator, its ``GradScaler`` included. ``accelerator.backward`` and ``accelerator.clip_grad_norm_`` have no place
    in the loop, as ``SharpnessAware(..., clip=1.0)`` clips::

        opt = AcceleratedSharpnessAware(steppe.SharpnessAware(base, steppe.sam(), clip=1.0), accelerator)
        model, opt, loader, scheduler = accelerator.prepare(model, opt, loader, scheduler)
        for data in loader:
            with accelerator.accumulate(model):
                loss = opt.step(steppe.Batch(model, loss_fn, data))
                scheduler.step()

    Args:
        optimizer: the step to be run.
        accelerator: the accelerator that prepares the model.

    Raises:
        TypeError: if ``optimizer`` is no ``SharpnessAware``.
        ValueError: if the accelerator's backend takes gradients or steps in its own way.

    Cost:
        The micro-batches of one step, without their activations, are kept until it runs.
    """

    _is_accelerate_prepared = True  # else ``prepare`` would wrap it once more

    def __init__(self, optimizer: SharpnessAware, accelerator: Accelerator) -> None:
        if not isinstance(optimizer, SharpnessAware):
            raise TypeError(f"optimizer is {type(optimizer).__name__}: give a steppe.SharpnessAware(base, method)")
        _refuse(accelerator)
        super().__init__(optimizer, device_placement=False)
        if accelerator.scaler is not None:
            optimizer.scaler = accelerator.scaler
        self._waiting: list[Batch] = []

    def step(self, closure: Batch | None = None) -> Tensor | None:
        """Take the micro-batch, and the step if it is complete.

        Args:
            closure: the micro-batch; all those of one step share model and ``loss_fn``.

        Returns:
            The mean loss of the step's first pass; None where the step is not yet complete.

        Raises:
            TypeError: if ``closure`` is no ``steppe.Batch``.
            ValueError: if the micro-batches of one step differ in model or ``loss_fn``.
        """
        if closure is None:
            self.optimizer.step()
            return None
        if not isinstance(closure, Batch):
            raise TypeError(
                f"AcceleratedSharpnessAware.step got {type(closure).__name__}: hand over every micro-batch, "
                "opt.step(steppe.Batch(model, loss_fn, data)), and leave out accelerator.backward"
            )
        self._waiting.append(closure)
        if not self.gradient_state.sync_gradients:
            return None
        waiting, self._waiting = self._waiting, []
        return self._take(Batch.join(waiting))

    def _take(self, batch: Batch) -> Tensor:
        """Take one step, and note for the scheduler whether an overflow kept it from happening."""
        before = self.optimizer.stats.steps
        loss: Tensor = self.optimizer.step(batch)
        self._is_overflow = self.optimizer.stats.steps == before
        return loss


def _refuse(accelerator: Accelerator) -> None:
    """Refuse the backends whose gradients or steps are not the optimizer's to take."""
    kind, mesh = accelerator.distributed_type, getattr(accelerator, "parallelism_config", None)
    if kind in _OWN_LOOP:
        raise ValueError(f"{kind.value} takes gradients and steps by itself: use DDP or FSDP2 with SharpnessAware")
    if kind == DistributedType.FSDP and not getattr(accelerator, "is_fsdp2", False):
        raise ValueError("FSDP1 flattens the parameters, so that ε would be that of a shard: set fsdp_version=2")
    if mesh is not None and mesh.non_data_parallel_size > 1:
        raise ValueError("tensor, context and sequence parallelism are not supported: use DDP or FSDP2")
