"""AdaHessian: Adam's step with the Hessian's diagonal in the place of the squared gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from .. import checks, vec
from ..batch import Batch
from ..products import with_products
from ..second_order import At, SecondOrder
from ..vec import Vec
from .averaging import Block, averaged
from .differences import with_differences


class AdaHessian(SecondOrder):
    """AdaHessian: momentum over the root mean square of the Hessian's diagonal, as Hutchinson estimates it.

        D = mean over probes of z ⊙ H z ,                        z = ±1 at random
        S = |D| (or D), averaged over blocks of neighbours
        m ← β₁ m + (1 − β₁) g ,    s ← β₂ s + (1 − β₂) S²
        w ← w − lr · m̂ / ((√ŝ)ᵏ + eps) ,                         m̂ = m / (1 − β₁ᵗ) ,  ŝ = s / (1 − β₂ᵗ)

    D is taken every ``n`` steps and stands in for the steps between, each of which takes it into s again, as the
    authors' code does. A parameter that has no D yet, because it was added or unfrozen since, stays where it is until
    then. Moments and D are kept in float32 at least. Of the model, only the graph of its loss is asked.

    Matrices are averaged over ``block`` consecutive entries of a row, the tables of ``nn.Embedding`` over whole rows,
    tensors of three dimensions or more over all but the first two (the kernel of a convolution), others not at all.

    Args:
        params: parameters, or parameter groups, whose keys may be ``lr``, ``betas``, ``eps``, ``weight_decay``,
            ``power`` and ``block``.
        lr: learning rate; default 0.15.
        betas: β₁ of the gradient and β₂ of the squared diagonal, in [0, 1); default (0.9, 0.999).
        eps: added to the denominator, > 0, in units of the Hessian to the power k; default 1e-4.
        weight_decay: decoupled: ``w ← (1 − lr·weight_decay) w`` before the step; default 0.
        power: k, in [0, 1]: 0 is the gradient's momentum alone, 1 (default) Newton's step along each axis.
        block: entries in a block of a matrix; default 1. ``"row"`` for whole rows, which a closure, that hides the
            model, needs for its embeddings.
        n: steps from one D to the next; default 1.
        probes: of one D; default 1.
        average: over a block: ``"absolute"`` (default) of |D|, as the authors' code, in which signs do not cancel;
            ``"signed"`` of D, as eq. 10.
        product: ``"exact"`` (default): by double backward, through the graph of the gradient. ``"difference"``:
            of two gradients on the same batch, which is off by some percent, and more with ReLU: see
            ``steppe.optim.differences``.
        at: where a sharpness-aware method has the diagonal taken; see ``SecondOrder``.
        seed: of the probes; see ``SecondOrder``.

    Raises:
        ValueError: if an argument is out of range. From a step, and weights and state are then as before: if a product
            is not finite (with a gradient scaler the step is skipped instead), the loss is not twice differentiable, a
            gradient is sparse, the model is sharded, or ``"difference"`` is asked for in bf16 or fp16, or without
            replay of random numbers.
        TypeError: from a step, if it gets neither a ``Batch`` nor, for ``"exact"``, a closure that returns the loss
            without calling ``backward``.

    Cost:
        ``1 + 2·probes/n`` propagations, with ``"difference"`` ``1 + probes/n``; two copies of the weights between
        steps, with ``n > 1`` three.

    Source:
        Yao et al. 2021, "AdaHessian: An adaptive second order optimizer for machine learning", eqs. 9 to 12 and
        algorithm 1; the decay and what stands in between probes: its released code.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.15,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        power: float = 1.0,
        block: Block = 1,
        n: int = 1,
        probes: int = 1,
        average: Literal["absolute", "signed"] = "absolute",
        product: Literal["exact", "difference"] = "exact",
        at: At = "perturbed",
        seed: int = 0,
    ) -> None:
        checks.count(n=n, probes=probes)
        checks.one_of(average=(average, ("absolute", "signed")), product=(product, ("exact", "difference")))
        self.n, self.probes, self.average, self.product = n, probes, average, product
        self.takes_closure = product == "exact"
        self.forget()
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "power": power, "block": block},
            at=at,
            seed=seed,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; what it does not state is as for the others.

        Raises:
            ValueError: if a value is out of range.
        """
        group = {**self.defaults, **param_group}
        checks.non_negative(lr=float(group["lr"]), weight_decay=group["weight_decay"])
        checks.positive(eps=group["eps"])
        checks.probability(power=group["power"])
        beta1, beta2 = group["betas"]
        checks.below_one(beta1=beta1, beta2=beta2)
        if isinstance(group["block"], str):
            checks.one_of(block=(group["block"], ("row",)))
        else:
            checks.count(block=group["block"])
        super().add_param_group(param_group)

    def cost(self) -> float:
        """Return the expected propagations of a step."""
        return 1 + (2 if self.product == "exact" else 1) * self.probes / self.n

    def forget(self) -> None:
        """Drop the diagonal of a step that did not come to its end."""
        self._seen: dict[Tensor, Tensor] = {}
        self._tables: set[Tensor] = set()

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
        """Run a pass as ``Batch.backward`` does, and estimate the diagonal at the weights as they are."""
        wanted = self.trainable()
        self._tables.update(_tables(batch.model))
        draw = self.generator("probes")
        probes = [[_signs(p, draw) for p in wanted] for _ in range(self.probes)]
        products = with_products if self.product == "exact" else with_differences
        own = set(wanted)
        others = [p for p in batch.model.parameters() if p.requires_grad and p not in own] if params is None else []
        with _in_words():
            losses, gradient, along = products(
                batch, wanted, probes, rows=rows, again=again, weight=weight, scaler=scaler, beside=others
            )
        self.extra = (0.0, 3.0 * self.probes) if self.product == "exact" else (float(self.probes),) * 2
        chosen = wanted if params is None else params
        kept = set(chosen)
        for p, slope in zip(wanted, gradient, strict=True):
            if slope is not None and p in kept:
                p.grad = slope if p.grad is None else p.grad.add_(slope)
        if reduce and params is None:
            batch.ranks.mean_gradients([*wanted, *others])
        scale = 1.0 if scaler is None else scaler.get_scale()
        diagonal = _diagonal(probes, along, share / (scale * self.probes))
        batch.ranks.mean_(diagonal)
        self._check(diagonal, wanted, batch, losses, scaler)
        for p, slope, part in zip(wanted, gradient, diagonal, strict=True):
            if slope is not None or batch.ranks.world > 1:
                self._seen[p] = self._seen[p].add_(part) if p in self._seen else part
        return losses

    def _check(
        self, diagonal: Vec, params: Vec, batch: Batch, losses: Tensor, scaler: torch.amp.GradScaler | None
    ) -> None:
        """Refuse a diagonal that is not finite; a scaler is told by a gradient that is not, and skips the step."""
        if math.isfinite(float(vec.norm(diagonal))):
            return
        for i, (p, part) in enumerate(zip(params, diagonal, strict=True)):
            if part.isfinite().all():
                continue
            if scaler is not None and scaler.is_enabled():
                p.grad = torch.full_like(p, math.nan)
                return
            name = batch.names().get(p, f"number {i} of shape {tuple(p.shape)}")
            raise ValueError(
                f"the Hessian's product with a probe is not finite at parameter {name}, step {self.steps} of "
                f"{type(self).__name__}, where the loss is {float(losses.mean()):g}: the weights are as before this "
                "step; a smaller learning rate may help, or a loss whose second derivative exists"
            )

    def update(self) -> None:
        """Move the weights by ``.grad`` and the diagonals."""
        seen, tables = self._seen, self._tables
        self.forget()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    diagonal = seen.get(p)
                    if diagonal is not None:
                        diagonal = diagonal.abs_() if self.average == "absolute" else diagonal
                        diagonal = averaged(diagonal, "row" if p in tables else group["block"])
                    self._move(p, diagonal, group)

    def _move(self, p: Tensor, diagonal: Tensor | None, group: dict[str, Any]) -> None:
        """Move one parameter, by this step's diagonal or by the last one that there was."""
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros(())
            for name in ("exp_avg", "exp_diagonal_sq") if self.n == 1 else ("exp_avg", "exp_diagonal_sq", "diagonal"):
                state[name] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        if self.n > 1 and diagonal is not None:
            state["diagonal"] = diagonal.contiguous()
        elif diagonal is None and state["step"] > 0:
            diagonal = state.get("diagonal")
        if diagonal is None:
            return
        state["step"] += 1
        (beta1, beta2), lr, t = group["betas"], float(group["lr"]), float(state["step"])
        mean = state["exp_avg"].lerp_(p.grad.to(state["exp_avg"].dtype), 1 - beta1)
        square = state["exp_diagonal_sq"].mul_(beta2).addcmul_(diagonal, diagonal, value=1 - beta2)
        grown = (1 - beta2**t) ** (group["power"] / 2)  # of the square's root to the power k, by now
        size = square.pow(group["power"] / 2).add_(group["eps"] * grown)
        moved = p if p.dtype == mean.dtype else p.to(mean.dtype)
        if group["weight_decay"]:
            moved.mul_(1 - lr * group["weight_decay"])
        moved.addcdiv_(mean, size, value=-lr * grown / (1 - beta1**t))
        if moved is not p:
            p.copy_(moved)


def _tables(model: nn.Module) -> Iterator[Tensor]:
    """Give the weights of the embeddings."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            if module.sparse:
                raise ValueError(f"layer {name} has a sparse gradient, without curvature: build it with sparse=False")
            yield module.weight


def _signs(p: Tensor, generator: torch.Generator) -> Tensor:
    """Return ±1 at random, drawn on the CPU, 8 to a byte: the same for every device."""
    drawn = torch.randint(256, (-(-p.numel() // 8),), dtype=torch.uint8, generator=generator)
    bits = torch.from_numpy(np.unpackbits(drawn.numpy())[: p.numel()].view(np.int8))
    return bits.mul_(2).sub_(1).to(p.device, p.dtype).view(p.shape)


def _diagonal(probes: list[Vec], products: list[Vec], factor: float) -> Vec:
    """Return ``factor · Σ z ⊙ H z``, in float32 at least."""
    total: Vec = []
    for z, product in zip(probes, products, strict=True):
        vec.mul_(product, z)
        wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in product]
        if total:
            vec.add_(total, wide)
        else:
            total = wide
    if factor != 1:
        vec.scale_(total, factor)
    return total


@contextmanager
def _in_words() -> Iterator[None]:
    """Say in words that the graph of the loss was gone."""
    try:
        yield
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise TypeError(
            "the graph of the loss is used up: return the loss without calling backward on it, and detach what is "
            "kept from one step to the next"
        ) from error
