"""Lightning's automatic optimization with a sharpness-aware optimizer: every pass sees every micro-batch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.loops.optimization.automatic import ClosureResult, _AutomaticOptimization
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.memory import recursive_detach
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric, MetricCollection

from ..batch import Batch
from ..step import SharpnessAware


class SharpnessAwareCallback(L.Callback):
    """Lets a ``SharpnessAware`` optimizer run all passes of a step over all micro-batches of the step.

    ``L = (1/B) Σ_j Σ_{i in j} ℓᵢ`` over the micro-batches j of one optimizer step: the mean over their examples, also
    where the last group of an epoch is shorter. ``Trainer(callbacks=[SharpnessAwareCallback()], ...)`` is all there is
    to write; the module's ``configure_optimizers`` returns the optimizer, and schedulers are built on it.

    Without it Lightning calls the optimizer with a bare closure that runs the last micro-batch. That is enough without
    accumulation, in 32-bit or bf16 precision, without BatchNorm, and for methods that look at no single examples; the
    rest is refused. But ``self.log`` runs in every pass, and clipping cuts the gradient of each pass instead of the
    direction (the same for SAM; Lightning refuses it under mixed precision).

    With it, per optimizer step:

    - ``training_step`` runs when the last micro-batch is there: once for each micro-batch and pass of the method.
      ``on_train_batch_end`` gets empty outputs for the others, and for the last those of its first pass.
    - ``training_step`` returns the mean loss. A method that looks at single examples needs their losses too, shape
      (B,): ``return {"loss": losses.mean(), "losses": losses}``.
    - ``self.log`` and torchmetrics count in the first pass and rest in further ones; what is called on a logger itself
      does not.
    - Hooks: ``on_before_zero_grad`` and ``optimizer_zero_grad`` once, before; ``on_before_backward`` for each
      micro-batch in the first pass; ``on_after_backward``, ``on_before_optimizer_step`` and
      ``configure_gradient_clipping`` once, with the direction in ``.grad``, unscaled.
    - Gradient scaler and clipping are the Trainer's, and so is autocast.

    Args:
        replay: whether every pass draws the random numbers (dropout) of the first, as in ``Batch``; default True.
        hold: ``hold(model)`` is a context manager that holds the statistics of norm layers torch does not know, as in
            ``Batch``; default None.

    Raises:
        ValueError: from the fit, if the strategy accumulates gradients itself, the module has a ``backward`` of its
            own, or the optimizer was built with a ``scaler`` or ``clip`` of its own.
        TypeError: from the fit, if ``training_step`` returns no loss or draws its own batches.

    Cost:
        ``method.cost()`` propagations a step. The batches of a step are kept on the device until it is taken.
    """

    def __init__(
        self, *, replay: bool = True, hold: Callable[[nn.Module], AbstractContextManager[Any]] | None = None
    ) -> None:
        self.replay, self.hold = replay, hold

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Put the loop that gathers micro-batches in the place of Lightning's own."""
        if stage != "fit":
            return
        if trainer.strategy.handles_gradient_accumulation:
            raise ValueError(
                f"{type(trainer.strategy).__name__} accumulates and steps by itself: use DDP or one device"
            )
        if type(pl_module).backward is not L.LightningModule.backward:
            raise ValueError(
                f"{type(pl_module).__name__}.backward would not be called: the step runs the backward passes itself"
            )
        epoch = trainer.fit_loop.epoch_loop
        loop = _Optimization(trainer, replay=self.replay, hold=self.hold)
        loop.optim_progress = epoch.automatic_optimization.optim_progress
        epoch.automatic_optimization = loop


class _Optimization(_AutomaticOptimization):
    """Keeps batches until their step is due, and hands them to the optimizer together."""

    def __init__(self, trainer: L.Trainer, **how: Any) -> None:
        super().__init__(trainer)
        self.how = how
        self.kept: list[tuple[Any, ...]] = []
        self.loss = _Loss(trainer)

    def run(self, optimizer: Optimizer, batch_idx: int, kwargs: OrderedDict[str, Any]) -> dict[str, Any]:
        if self._skip_backward or not isinstance(optimizer, SharpnessAware):
            return super().run(optimizer, batch_idx, kwargs)
        if "batch" not in kwargs:
            raise TypeError("training_step(dataloader_iter) draws its own batches, which pass two cannot see again")
        if optimizer.scaler is not None or optimizer.clip is not None:
            raise ValueError(
                "Lightning's Trainer scales and clips: give Trainer(precision=..., gradient_clip_val=...), "
                "and build SharpnessAware without scaler and clip"
            )
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.kept.clear()  # what an epoch cut short has left
        self.kept.append(tuple(kwargs.values()))
        if self.trainer.fit_loop._should_accumulate():
            return {}
        self.loss.outputs = {}
        # the precision plugin would hide the batch behind a closure, or call the optimizer without one
        with _changed(self.trainer.precision_plugin, optimizer_step=lambda _, closure, **__: closure()):
            self._optimizer_step(batch_idx, partial(self._step, optimizer, batch_idx))
        self.kept.clear()
        return self.loss.outputs

    def _step(self, optimizer: SharpnessAware, batch_idx: int) -> Tensor:
        self._on_before_zero_grad(optimizer)
        self._optimizer_zero_grad(batch_idx, optimizer)
        assert self.trainer.strategy.model is not None
        batch = _Passes.from_micro_batches(self.trainer.strategy.model, self.loss, self.kept, **self.how)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        with _changed(optimizer, scaler=scaler, clip=partial(self._before_base, optimizer)):
            return optimizer.step(batch)

    def _before_base(self, optimizer: SharpnessAware, _: list[Tensor]) -> None:
        _call_hooks(self.trainer, "on_after_backward")
        # the gradients are unscaled by now; an optimizer that unscales later would not be clipped
        with _changed(optimizer, _step_supports_amp_scaling=False):
            self.trainer.precision_plugin._after_closure(self.trainer.lightning_module, optimizer)  # type: ignore[arg-type]


class _Loss:
    """``training_step`` as a loss function: ``aloud`` where it logs, ``outputs`` of its last run aloud."""

    def __init__(self, trainer: L.Trainer) -> None:
        self.trainer = trainer
        self.aloud = False
        self.outputs: dict[str, Any] = {}
        self.spares: list[tuple[nn.Module, str, Any]] | None = None

    def __call__(self, model: nn.Module, data: tuple[Any, ...]) -> Tensor:
        trainer = self.trainer
        # what is logged is weighed by the size of its batch
        logged = _changed(trainer._results, batch=data[0], batch_size=None) if self.aloud else self._silent()
        with logged:
            output = call._call_strategy_hook(trainer, "training_step", *data)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise TypeError(f"training_step returned {output!r}: a sharpness-aware step needs its loss in every pass")
        if self.aloud:
            result = ClosureResult.from_training_step_output(recursive_detach(output), trainer.accumulate_grad_batches)
            self.outputs = result.asdict()
            _call_hooks(trainer, "on_before_backward", loss)
        losses: Tensor = output.get("losses", loss) if isinstance(output, Mapping) else loss
        return losses

    @contextmanager
    def _silent(self) -> Iterator[None]:
        """Let ``module.log`` do nothing, and metrics count elsewhere."""
        module = self.trainer.lightning_module
        if self.spares is None:
            self.spares = [(owner, name, m.clone()) for owner in module.modules() for name, m in _metrics(owner)]
        with ExitStack() as stack:
            stack.enter_context(_changed(module, log=_nothing))
            for owner, name, spare in self.spares:
                spare.reset()
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, spare)
            yield


class _Passes(Batch):
    """A batch that tells its loss function which pass is the first one."""

    loss_fn: _Loss

    @contextmanager
    def running(self, again: bool, rows: Tensor | None = None) -> Iterator[Callable[[int], None]]:
        self.loss_fn.aloud = not again
        try:
            with super().running(again, rows) as begin:
                yield begin
        finally:
            self.loss_fn.aloud = False


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _metrics(owner: nn.Module) -> list[tuple[str, Any]]:
    if isinstance(owner, (Metric, MetricCollection)):
        return []
    return [(name, m) for name, m in owner.named_children() if isinstance(m, (Metric, MetricCollection))]


def _call_hooks(trainer: L.Trainer, name: str, *args: Any) -> None:
    call._call_callback_hooks(trainer, name, *args)
    call._call_lightning_module_hook(trainer, name, *args)


@contextmanager
def _changed(thing: object, **values: Any) -> Iterator[None]:
    """Give one object other attributes for a while; those of its class come to light again afterwards."""
    own = vars(thing)
    found = {name: own[name] for name in values if name in own}
    own.update(values)
    try:
        yield
    finally:
        for name in values:
            del own[name]
        own.update(found)
