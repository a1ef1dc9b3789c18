"""Newton's method by conjugate gradients, without a matrix: Hessian-free optimization."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import checks, rounding, vec
from ..batch import Batch
from ..curvature import Objective
from ..curvature.operator import COST
from ..second_order import At, SecondOrder
from ..vec import Vec
from .cg import conjugate_gradients
from .quadratic import Quadratic, Source

HALVINGS = 6
"""How often a step under which the loss rises is halved before it is left out."""
DAMPINGS = 1e-20, 1e20
"""Within these λ is adapted."""


class NewtonCG(SecondOrder):
    """Newton's method with products of the curvature matrix only, for small models and large batches.

        (B + λI) d = −g,    w ← (1 − lr·weight_decay) w + lr·d

    B is the generalised Gauss-Newton matrix or the Hessian of the batch. With ``adapt`` the step ``s = lr·d`` is
    judged by the change of the loss, without weight decay, that it makes where the curvature was taken:

        ρ = (L(w + s) − L(w)) / (gᵀs + ½ sᵀB s);    λ ← 3/2 λ if ρ < 1/4,    λ ← 2/3 λ if ρ > 3/4

    and is halved while the loss rises or is not finite, in the end to 0. Changes as small as the loss's rounding are
    not judged. One λ serves all parameter groups.

    Args:
        params: parameters, or groups with ``lr`` and ``weight_decay`` of their own; in float32 or float64.
        lr: factor of the direction; default 1.
        curvature: ``"ggn"`` (default), which is positive semi-definite, and for cross-entropy the Fisher matrix; or
            ``"hessian"``: its conjugate gradients stop at the first direction of negative curvature, with ``d = −g``
            if that is the first of all.
        damping: λ at the first step, above 0; default 1. ``self.damping`` is the present one.
        adapt: whether λ is adapted and the loss must not rise; default True.
        iterations: of conjugate gradients, at most; default 50.
        tolerance: they stop when the model gains less than this share of itself an iteration; default 5e-4.
        warm: they start from ``warm`` times the last direction; default 0.95. With the Hessian always from 0.
        weight_decay: decoupled; default 0.
        at: where curvature is taken under a sharpness-aware method, see ``SecondOrder``. Default ``"perturbed"``.

    Raises:
        ValueError: if an argument is out of range. From steps, with the weights as they were: if the loss has no second
            derivative, a gradient or product is not finite, or the weights have fewer than 32 bits or are sharded.

    Cost:
        At most ``cost()`` propagations; ``products`` counts those of the last step with B. Memory: one graph for double
        backward, kept from product to product; for a batch in several parts it is built anew instead. A model that is
        partly in eval mode is looked at in training mode.

    Source:
        Martens 2010, "Deep learning via Hessian-free optimization": sections 4.1 (λ), 4.4 (stopping), 4.5 (warm start).
        Without its preconditioner. ρ leaves λ out of the denominator, as trust-region methods do.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        *,
        curvature: Literal["ggn", "hessian"] = "ggn",
        damping: float = 1.0,
        adapt: bool = True,
        iterations: int = 50,
        tolerance: float = 5e-4,
        warm: float = 0.95,
        weight_decay: float = 0.0,
        at: At = "perturbed",
    ) -> None:
        checks.one_of(curvature=(curvature, ("ggn", "hessian")))
        checks.positive(damping=damping)
        checks.flag(adapt=adapt)
        checks.count(iterations=iterations)
        checks.non_negative(tolerance=tolerance)
        checks.probability(warm=warm)
        self.curvature, self.adapt = curvature, adapt
        self.iterations, self.tolerance, self.warm = iterations, tolerance, warm
        self.products = 0
        self._initial, self._seen = damping, list[Source]()
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, at=at)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see ``torch.optim.Optimizer.add_param_group``.

        Raises:
            ValueError: if its learning rate or weight decay is negative or not finite.
        """
        for name in ("lr", "weight_decay"):
            checks.non_negative(**{name: param_group.get(name, self.defaults[name])})
        super().add_param_group(param_group)

    @property
    def damping(self) -> float:
        """λ of the step to come."""
        kept = [kept for kept in self.state.values() if "damping" in kept]
        return float(max(kept, key=lambda each: int(each["step"]))["damping"]) if kept else self._initial

    def cost(self) -> float:
        """Return an upper bound of the propagations of a step on a batch in one part.

        The gradient, the graph for the products, the products of all iterations, of the warm start and of the model's
        value, and the losses at every halving. Conjugate gradients often stop earlier, and most steps are not halved.
        Each part more than one of a batch adds its share of a propagation to every product.
        """
        losses = (2 + HALVINGS) / 3 if self.adapt else 0
        beside = int(self.curvature == "ggn" and self.warm > 0) + int(self.adapt)
        return 2 + (self.iterations + beside) * COST[self.curvature] + losses

    def backward(
        self,
        batch: Batch,
        params: Vec | None,
        *,
        share: float = 1.0,
        rows: Tensor | None = None,
        again: bool = False,
        reduce: bool = True,
        weight: float = 1.0,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor:
        """Run a pass as ``Batch.backward`` does, and remember the batch and the weights; see ``SecondOrder``."""
        losses = batch.backward(params, rows=rows, again=again, reduce=reduce, weight=weight, scaler=scaler)
        with batch.running(True):  # its random numbers are those of the pass
            objective = Objective(
                batch.model,
                batch.loss_fn,
                [data for data, _ in batch.chunks(rows)],
                params=self.trainable(),
                mode="train" if batch.model.training else "eval",
                autocast=batch.autocast,
            )
        objective.group = None  # averaged over the ranks as the gradient is, weights included
        weights = vec.clone([p.detach() for p in objective.params])
        self._seen.append(Source(share * weight, objective, weights, batch.ranks))
        return losses

    def forget(self) -> None:
        """Drop what was seen for a step that did not come to its end."""
        self._seen = []

    @torch.no_grad()
    def update(self) -> None:
        """Solve for the direction, and move the weights along it.

        Raises:
            ValueError: before any weight is moved for good.
        """
        seen, self._seen = self._seen, []
        everyone = self.trainable()
        params = [p for p in everyone if p.grad is not None]
        if not seen and any(group["lr"] for group in self.param_groups):
            raise ValueError("NewtonCG has seen no batch for this step: write opt.step(steppe.Batch(...))")
        if params and rounding.is_low(params):
            raise ValueError("NewtonCG solves in the type of the weights, and one has fewer than 32 bits: keep them in "
                             "float32, with Batch(..., autocast=...) for mixed precision")  # fmt: skip
        for p in everyone:
            if "step" not in self.state[p]:
                present = torch.tensor(self.damping, dtype=torch.float64)
                self.state[p].update(step=torch.zeros(()), direction=torch.zeros_like(p), damping=present)
        if not seen or not params:
            return
        model = Quadratic(seen, params, self.curvature)
        g = model.join([p.grad for p in model.params if p.grad is not None])
        if not g.isfinite().all():
            raise ValueError("a gradient handed to NewtonCG is not finite: the weights are as before this step")
        damping = self.damping
        start = self.warm * model.join([self.state[p]["direction"] for p in model.params])
        with model.away():
            solution = conjugate_gradients(
                lambda v: model @ v + damping * v,
                -g,
                iterations=self.iterations,
                tolerance=self.tolerance,
                start=start if self.curvature == "ggn" else None,
            )
            direction = model.split(solution.x)
            rates = [self.group_of(p)["lr"] for p in model.params]
            step = [float(lr) * d for lr, d in zip(rates, direction, strict=True)]
            factor, damping = self._judge(model, g, step) if self.adapt else (1.0, damping)
        self.products = model.products
        self.late = sum(each.objective.passes * each.objective.examples for each in seen)
        for p, d, s in zip(model.params, direction, step, strict=True):
            group = self.group_of(p)
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(s, alpha=factor)
            self.state[p]["direction"].copy_(d)
        for p in everyone:
            self.state[p]["step"] += 1
            self.state[p]["damping"].fill_(damping)

    def _judge(self, model: Quadratic, g: Tensor, step: Vec) -> tuple[float, float]:
        """Return the share of the step under which the loss does not rise, and the λ to come."""
        damping, flat = self.damping, model.join(step)
        before, expected = model.loss(), float(g @ flat + flat @ (model @ flat) / 2)
        if abs(expected) <= 10 * torch.finfo(g.dtype).eps * abs(before):
            return 1.0, damping
        for halving in range(HALVINGS + 1):
            change = model.loss(step, 0.5**halving) - before
            if halving == 0 and expected < 0:
                ratio = change / expected if math.isfinite(change) else -math.inf
                damping *= 3 / 2 if ratio < 1 / 4 else 2 / 3 if ratio > 3 / 4 else 1
                damping = min(max(damping, DAMPINGS[0]), DAMPINGS[1])
            if change <= 0:
                return 0.5**halving, damping
        return 0.0, damping
