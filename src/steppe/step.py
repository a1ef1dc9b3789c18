"""The sharpness-aware step: two passes, four parts, one function."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from . import checks, groups, split, update, vec
from . import rounding as low_precision
from .batch import Batch
from .checkpoint import pack, unpack
from .closure import BATCH, INTEGRATIONS, Closure, Left
from .method import Method
from .others import Others
from .passes import Passes, Source
from .point import Memory, Point
from .ranks import Ranks
from .second_order import SecondOrder
from .stats import Stats
from .vec import Vec


class SharpnessAware(Passes):
    """A sharpness-aware step around any torch optimizer.

    ``g0 = ∇L_B(w)``, ``g1 = ∇L_B'(w + ε)``; the direction that the method makes of the two is handed to the base as
    ``.grad``. Parameter groups and state are the base's own, so a learning-rate scheduler may be built on either. A
    group's key ``"rho"`` is its own radius on the steps that the method makes sharp; 0 leaves the group unperturbed.

    Args:
        base: the optimizer that takes the step, over the parameters to be trained.
        method: what the step does: ``steppe.sam()`` and its like, or ``steppe.parse(text)``.
        ascent: under data parallelism, ``"global"`` (default) for one ε from the gradient of all ranks, the same run
            on 1 or 8 devices; ``"local"`` for m-sharpness: each rank its own ε, and no all-reduce for it.
        split: whether the two passes run on two groups of ranks, for methods whose passes are independent (RWP).
        scaler: gradient scaler of fp16 training; it scales, unscales, checks and updates once a step.
        clip: of the direction, after the unscaling: the largest norm over all parameters, or a function of their list,
            as ``functools.partial(torch.nn.utils.clip_grad_value_, clip_value=0.5)``. Default None.
        rounding: how bf16 and fp16 weights are perturbed: ``"stochastic"`` (default), ``"nearest"``, which loses what
            is below half a unit in the last place, or ``"float32"``: pass two runs in a float32 copy.
        seed: seed of all that the method draws; draws are a function of (seed, step, purpose). Default 0.
        total_steps: length of the training in steps; needed by methods with a schedule over the whole training.

    Raises:
        TypeError: if ``base`` is no optimizer that takes one gradient a step, or ``method`` is no ``Method``.
        ValueError: if nothing is trainable, a parameter is complex, the base maximizes, an option is unknown or
            excluded by the method, or the method needs ``total_steps`` and does not get it.
    """

    _left = Left([])
    _has_looked = False
    _step_supports_amp_scaling = True  # a scaler that calls step() itself shows in ``grad_scale``, and is refused

    def __init__(
        self,
        base: Optimizer,
        method: Method,
        *,
        ascent: Literal["global", "local"] = "global",
        split: bool = False,
        scaler: torch.amp.GradScaler | None = None,
        clip: update.Clip = None,
        rounding: low_precision.Rounding = "stochastic",
        seed: int = 0,
        total_steps: int | None = None,
    ) -> None:
        if not isinstance(base, Optimizer) or isinstance(base, (SharpnessAware, LBFGS)):
            raise TypeError(f"base is {type(base).__name__}: give an optimizer that takes one gradient a step, as SGD")
        if not isinstance(method, Method):
            raise TypeError(f"method is {method!r}: give a recipe such as steppe.sam(), or steppe.parse(text)")
        super().__init__(base)
        self.method, self.seed, self.total_steps = method, seed, total_steps
        self.ascent, self.split, self.rounding = ascent, split, rounding
        self.scaler, self.clip = scaler, clip
        self.stats = Stats()
        self._memory: dict[Tensor, dict[str, Any]] = {}
        self._check()

    def _check(self) -> None:
        method = self.method
        if not self.trainable():
            raise ValueError("the base optimizer holds no trainable parameter: none has requires_grad=True")
        self._refuse()
        checks.one_of(ascent=(self.ascent, ("global", "local")))
        checks.one_of(rounding=(self.rounding, ("stochastic", "nearest", "float32")))
        update.check_clip(self.clip)
        if self.total_steps is not None:
            checks.count(total_steps=self.total_steps)
        if method.needs_total and self.total_steps is None:
            raise ValueError(
                f"{method!r} follows a schedule: give SharpnessAware(..., total_steps=<steps of the training>)"
            )
        if self.ascent == "local":
            method.check_groups('ascent="local" gives each rank its own ε')
        if self.split:
            split.check(method)
            if isinstance(self.base, SecondOrder):
                raise ValueError(f"split=True leaves each rank one pass of the two, and {type(self.base).__name__} "
                                 "would see half of its curvature: leave split out")  # fmt: skip

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Batch | Callable[[], Any] | None = None, second: Batch | None = None
    ) -> Tensor:
        """Take one step and return the mean loss of its first pass on this rank, detached.

        Gradients that were there before are discarded; the direction taken is left in ``.grad``. Parameters of the
        model that the base does not hold get the gradient of the last pass, added to what was there.

        Args:
            closure: a ``steppe.Batch``; or a closure that clears the gradients, calls ``backward`` and returns the
                loss, for methods that look at no single examples and models without running statistics.
            second: the batch of pass two, for methods that take another one (``rwp(other=True)``) and no others.

        Raises:
            TypeError: if ``closure`` is neither, or too little for the method or the loop.
            ValueError: if a loss is not finite: weights and the base's state are then as they were before the step.
                With a gradient scaler such a step is skipped instead, as ever. Also if a second batch is missing, too
                many or of another model, a gradient is sparse, or a sharded model cannot do what is asked.

        Cost:
            ``method.cost()`` propagations, counted in ``stats``, and one wait for the loss.
        """
        if closure is None and all(group.get("lr") == 0 for group in self.param_groups):
            self.base.step()  # so torch.distributed.checkpoint has the state made
            return torch.zeros(())
        source = self._source(closure, second)
        self.stats.examples += source.size
        model = source.model.parameters() if isinstance(source, Batch) else ()
        self._others = Others(model, self.params(), copy=source.ranks.shared_buffers)
        try:
            return self._advance(source, second)
        except BaseException:
            for p in self.params():
                p.grad = None
            self._others.restore()
            source.ranks.forget()
            raise

    def _advance(self, source: Source, second: Batch | None) -> Tensor:
        """Run the passes, let the base step, and return the mean loss of pass one."""
        if isinstance(self.base, SecondOrder):
            self.base.begin()
        method, ranks, params = self.method, source.ranks, self.trainable()
        rho, own = method.when(self._point([], 0)), groups.radii(self.base)
        if rho and own and not any(own.get(p, rho) for p in params):
            rho = 0.0
        local = ranks.ddp is not None and (self.ascent == "local" or method.m is not None)
        late = local and bool(rho) and (method.m is not None or method.combine.needs_g0)
        parts = source.groups(method.m) if rho and method.m and isinstance(source, Batch) else [source]
        sums: dict[Tensor, Tensor] = {}
        firsts: list[Tensor] = []
        seen: list[Tensor] = []
        sharp = False
        for number, part in enumerate(parts):
            at = self._point(params, ranks.rank * len(parts) + number if local else number)
            weight = part.size / source.size
            means = self._direction(at, part, second, rho, share=weight, local=local, reduce=not late)
            firsts.append(means[0] if weight == 1 else weight * means[0])
            seen += means
            sharp = sharp or at.rho > 0
            for p in [*params, *self._others.params] if len(parts) > 1 else []:
                if p.grad is not None:
                    sums[p] = sums[p].add_(p.grad, alpha=weight) if p in sums else p.grad.mul_(weight)
        for p, direction in sums.items():
            p.grad = direction
        if late:
            ranks.mean_gradients([*params, *self._others.params])
        self._check_finite(seen, source)
        scaler = self._active()
        scale = 1.0
        if scaler is not None:
            scale = scaler.get_scale()
            self._doubt(params, self._others.grads())
        if update.take(self.base, params, self.scaler, self.clip):
            at.memory.commit()
            self.stats.steps += 1
            self.stats.sharp += sharp
            self._others.settle(scale)
            if isinstance(self.base, SecondOrder):
                self.stats.count(self.base.late)
        else:
            self.stats.skipped += 1
            self._others.restore()
        self._left = Left(params)
        return sum(firsts[1:], firsts[0])

    def _check_finite(self, means: list[Tensor], source: Source) -> None:
        """Refuse a step that went wrong, on all ranks alike."""
        if self._active() is not None:
            return
        if source.ranks.is_alone:
            judged, where = sum(means[1:], means[0]), "the loss is"
        else:
            judged = vec.norm([p.grad for p in self.trainable() if p.grad is not None])
            where = "a loss or gradient of one of the ranks is not finite; here the loss is"
        if not math.isfinite(float(judged)):
            raise ValueError(
                f"{where} {', then '.join(f'{float(m):g}' for m in means)} at step {self.stats.steps} with "
                f"{self.method!r}: the weights are as before this step; a smaller learning rate or rho may help"
            )

    def _source(self, closure: Batch | Callable[[], Any] | None, second: Batch | None) -> Source:
        """Return where the step takes its gradients from, or refuse what is too little."""
        if hasattr(self, "grad_scale"):
            for left in ("grad_scale", "found_inf"):  # else every later step would look like this one
                self.__dict__.pop(left, None)
            raise TypeError(
                "a GradScaler called the step, which then cannot scale both passes: write "
                f"SharpnessAware(..., scaler=scaler) and opt.step(batch), without scaler.step(opt); {INTEGRATIONS}"
            )
        if not callable(closure) and not isinstance(closure, Batch):
            raise TypeError(f"opt.step needs the passes to run, not {closure!r}: {BATCH}; {INTEGRATIONS}")
        if isinstance(closure, Batch):
            self._check_batch(closure, second)
            return closure
        self._check_closure(second)
        repeats = self.method.needs_first and self.method.when.share(None) > 0
        first, self._has_looked = not self._has_looked, True
        return Closure(closure, self.trainable(), repeats=repeats, eager=first)

    def _check_batch(self, batch: Batch, second: Batch | None) -> None:
        split_up = self.split and batch.ranks.world > 1
        if self.method.needs_second != (second is not None) and not split_up:
            takes = "takes a second batch: opt.step(batch, second)" if second is None else "takes no second batch"
            raise ValueError(f"{self.method!r} {takes}")
        if second is not None and not isinstance(second, Batch):
            raise TypeError(f"the second batch is {type(second).__name__}: give a steppe.Batch(model, loss_fn, batch)")
        if second is not None and second.model is not batch.model:
            raise ValueError("the second batch is of another model: give both batches the same, wrapped or not")
        if batch.ranks.sharded and (self.ascent == "local" or self.method.m is not None or self.split):
            raise ValueError(
                "a sharded model has one ε for all ranks: each holds a shard of the weights, so no rank can go its own "
                'way (no ascent="local", no m_sharpness, no split)'
            )
        batch.per_example = self.method.select is not None and self.method.select.needs_rise

    def _check_closure(self, second: Batch | None) -> None:
        if second is not None:
            raise TypeError(f"a second batch goes with a first one, not with a closure: {BATCH}")
        reason = None
        if self.method.needs_examples:
            reason = f"{self.method!r} looks at single examples or at the model, which a bare closure hides"
        elif isinstance(self.base, SecondOrder):
            reason = f"{type(self.base).__name__} looks at the curvature, which a bare closure hides"
        elif self._active() is not None:
            reason = "a bare closure hides whether its loss is scaled"
        elif self.ascent == "local" or self.split:
            reason = "a bare closure hides the model, whose all-reduce is to be left out of a pass"
        elif self._masks() and not Ranks(None).is_alone:
            reason = "on several ranks the gradients of a masked pass are averaged by hand, which needs the model"
        elif self.rounding == "float32":
            reason = "a bare closure hides the model, which is to be run in float32"
        elif self._left.is_changed(self.trainable()):
            reason = (
                "gradients were accumulated before this step, which a bare closure cannot repeat at w + ε (clear them "
                "with opt.zero_grad() if they are not meant; Batch.from_micro_batches takes several micro-batches)"
            )
        if reason is not None:
            raise TypeError(f"{reason}: {BATCH}; {INTEGRATIONS}")

    def _point(self, params: Vec, group: int) -> Point:
        first = self.base.param_groups[0]
        lr = float(first["lr"]) if "lr" in first else 0.0
        peak = float(first.get("max_lr", first.get("initial_lr", lr)))
        return Point(self.stats.steps, self.total_steps, lr, peak, self.seed, group, Memory(self._memory, params))

    def _save(self) -> dict[str, Any]:
        header = {**self._names(), "seed": self.seed, "stats": asdict(self.stats)}
        return pack(self.base, self._memory, header, self.method.memories)

    def _names(self) -> dict[str, str]:
        """Return what tells the method: its expression, and its parts, which several expressions may share."""
        return {"method": repr(self.method), "parts": repr(replace(self.method))}

    def _load(self, saved: dict[str, Any]) -> None:
        header = unpack(self.base, self._memory, saved, self._names())
        self.stats = Stats(**header["stats"]) if header else Stats()
        self.seed = header["seed"] if header else self.seed
