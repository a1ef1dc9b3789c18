"""The natural gradient: steepest descent where distance is how far the model's predictions move."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import checks, vec
from ..batch import Batch
from ..curvature.products import Likelihood
from ..second_order import At, SecondOrder
from ..vec import Vec
from . import dense, descent, found
from .blocks import Block
from .look import Look
from .partition import DENSE, Fisher, partition


class NaturalGradient(SecondOrder):
    """Descent along the gradient preconditioned by the inverse of the Fisher matrix.

    ``m ← μm + g``, ``d = (F + λI)⁻¹ m``, ``u = s·lr·d``, ``w ← w − lr·wd·w − u``,
    with ``F = (1/B) Σ_n E_y[∇log p(y|x_n) ∇log p(y|x_n)ᵀ]``, y drawn from the model, and with a trust region
    ``s = min(1, √(kl / (½ lr² dᵀFd)))``, else 1, so that ``½uᵀFu``, the divergence KL(p(w) ‖ p(w − u)) to second order,
    is at most ``kl``. F is a running average ``F ← decay·F + (1 − decay)·F_batch``, the first one F_batch itself.

    The examples lie along dimension 0 of every layer's input: sequences that come first there, (T, B, d), are taken for
    examples. The ``"exact"``, ``"mc"`` and ``"empirical"`` matrices see every layer in the mode of the whole model, one
    that was left in eval mode by itself too.

    Args:
        params: parameters, or parameter groups, which may have an ``lr``, ``damping``, ``momentum`` and
            ``weight_decay`` of their own. A layer takes the damping of its weight.
        lr: step size; 1 is Newton's where F is the Hessian. Default 0.1.
        fisher: which Fisher matrix: the whole of a model of at most 5 000 weights, by its ``"exact"`` expectation over
            labels, ``"mc"`` with drawn labels, or the ``"empirical"`` one with the labels of the data, which is no
            Fisher matrix and does not converge with a fixed step; its ``"diagonal"``; or blocks of layers, ``"kfac"``
            (default) and ``"ekfac"``. A parameter that K-FAC does not know gets a diagonal: see ``fallback``.
        damping: λ > 0. Default 1e-3.
        momentum: μ, of the gradients, before they are preconditioned: so that the trust region is one for the whole
            step. Default 0.9.
        weight_decay: decoupled decay wd. Default 0.
        decay: weight of the past in the running averages, in [0, 1). Default 0.95.
        n: steps from one look at the curvature to the next. Default 10.
        n_inverse: steps from one inversion of K-FAC's factors to the next, at looks; the other matrices are inverted at
            every look. A change of the damping waits for that with the whole matrix and with ``form="factored"``, and
            holds at once else. Default 100.
        kl: largest ½uᵀFu of a step, in nats, with the F that is inverted. Default 1e-3; None for no trust region,
            with which a damping that is too small for the task ends in divergence.
        draws: labels drawn for each example; None for their exact expectation, with a backward pass for each class; a
            diagonal then takes one for each class of each example. Default 1. The dense matrices other than ``"mc"``
            have no use for it.
        labels: ``"model"`` (default) for labels of its own; ``"data"`` for an empirical diagonal, K-FAC or EKFAC: for
            any loss, and biased.
        likelihood: what the model's outputs mean, for labels of its own: ``"categorical"`` (default) for logits (B, C),
            ``"gaussian"`` for means (B, ...) at variance 1.
        sharing: K-FAC's factors of weights that are shared over positions, ``"expand"`` (default) or ``"reduce"``.
        norms: blocks of normalisation layers, ``"diagonal"`` (default) or ``"full"``.
        form: K-FAC's damping, ``"tikhonov"`` (default), that of the matrix itself, or ``"factored"``.
        at: where a sharpness-aware method has F taken, ``"perturbed"`` (default) or ``"weights"``.
        seed: of the labels drawn. Each rank draws those of its own examples.

    Attributes:
        fallback: of parameters that K-FAC does not know, the name and the reason; known after the first step.

    Raises:
        ValueError: if an argument is out of range; from a step, if a factor is singular or not finite, or the model is
            sharded. The weights are then as before.

    Cost:
        On average 1 + 1/3n propagations for each draw with K-FAC, 1 + 2/3n with the diagonal, 1 + (1 + 4k/3)/n for the
        whole matrix of k weights. Inversions: two eigenvalue problems a layer, shared out among the ranks.

    Source:
        Amari 1998, "Natural gradient works efficiently in learning"; Martens 2020, "New insights and perspectives on
        the natural gradient method", equations 3 to 6; Martens and Grosse 2015, "Optimizing neural networks with
        Kronecker-factored approximate curvature".
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.1,
        *,
        fisher: Fisher = "kfac",
        damping: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        decay: float = 0.95,
        n: int = 10,
        n_inverse: int = 100,
        kl: float | None = 1e-3,
        draws: int | None = 1,
        labels: Literal["model", "data"] = "model",
        likelihood: Likelihood = "categorical",
        sharing: Literal["expand", "reduce"] = "expand",
        norms: Literal["diagonal", "full"] = "diagonal",
        form: Literal["tikhonov", "factored"] = "tikhonov",
        at: At = "perturbed",
        seed: int = 0,
    ) -> None:
        checks.one_of(
            fisher=(fisher, (*DENSE, "diagonal", "kfac", "ekfac")),
            labels=(labels, ("model", "data")),
            likelihood=(likelihood, ("categorical", "gaussian")),
            sharing=(sharing, ("expand", "reduce")),
            norms=(norms, ("diagonal", "full")),
            form=(form, ("tikhonov", "factored")),
        )
        checks.below_one(decay=decay)
        checks.count(n=n, n_inverse=n_inverse)
        if kl is not None:
            checks.positive(kl=kl)
        if draws is not None:
            checks.count(draws=draws)
        elif fisher == "mc":
            raise ValueError('draws=None is the exact expectation: take fisher="exact"')
        if labels == "data" and fisher in DENSE[:2]:
            raise ValueError(
                f'fisher={fisher!r} has labels of the model: with those of the data it is fisher="empirical"'
            )
        if fisher == "ekfac" and form == "factored":
            raise ValueError('form="factored" damps the two factors of K-FAC, and EKFAC is no product: take "tikhonov"')
        self.fisher, self.labels, self.likelihood, self.draws = fisher, labels, likelihood, draws
        self.decay, self.n, self.n_inverse, self.kl = decay, n, n_inverse, kl
        self.sharing, self.norms, self.form = sharing, norms, form
        self.fallback: dict[str, str] = {}
        self._blocks: list[Block] = []
        self._found = found.Found()
        self._spent: float | None = None
        defaults = {"lr": lr, "damping": damping, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults, at=at, seed=seed)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters.

        Raises:
            ValueError: if one of its values is out of range.
        """
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def is_due(self) -> bool:
        """Whether the step to come looks at the curvature, or at the model for the first time."""
        return not self._blocks or self._refreshes()

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
        """Run a pass, and see the Fisher matrix of its examples; see `SecondOrder.backward`.

        Raises:
            ValueError: if the model is sharded, or parameters of this optimizer are not the model's.
        """
        self._prepare(batch)
        how: dict[str, Any] = {"rows": rows, "again": again, "reduce": reduce, "weight": weight, "scaler": scaler}
        self.extra = (0.0, 0.0)
        if not self._refreshes():
            return batch.backward(params, **how)
        self._found.ranks = batch.ranks
        generator = self.generator(f"labels/{batch.ranks.rank}/{self._found.sources}", batch.device)
        if self.fisher in DENSE:
            losses = batch.backward(params, **how)
            weights, seed = self._blocks[0].params, generator.initial_seed()
            estimate, spent = dense.fisher(batch, weights, self.fisher, losses, rows, self.likelihood, self.draws, seed)
            self._found.add([{"fisher": estimate}], [], share)
            self.extra = (1.0, 1.5 * spent - 0.5)
        else:
            look = Look(self._blocks, self.labels, self.likelihood, self.draws, generator, self.fisher == "ekfac")
            with look.watching(batch, batch.size if rows is None or params == [] else len(rows)):
                losses = batch.backward(params, **how)
            self._found.add(look.estimates, look.kept, share)
            self.extra = (0.0, look.passes)
        self._spent = sum(self.extra) / 3 + self.extra[1] / 3
        return losses

    def forget(self) -> None:
        """Drop what was seen."""
        self._found = found.Found()

    def cost(self) -> float:
        """Return the propagations of a step on average; not a number until the model is known, if ``draws`` is None."""
        spent = self._spent
        if spent is None and self.fisher in DENSE:
            spent = 1 + 4 / 3 * sum(p.numel() for p in self.trainable())
        elif spent is None:
            draws = 1 if self.labels == "data" else math.nan if self.draws is None else self.draws
            spent = draws * (2 if self.fisher == "diagonal" else 1) / 3
        return 1 + spent / self.n

    @torch.no_grad()
    def update(self) -> None:
        """Take the step; see `SecondOrder.update`."""
        if not self._blocks:
            raise ValueError("the state of NaturalGradient depends on the model: take a step on a Batch before a "
                             "distributed checkpoint is read into it")  # fmt: skip
        for group in self.param_groups:
            _check(group)
        home = {p: group for group in self.param_groups for p in group["params"]}
        dampings = [home[block.params[0]]["damping"] for block in self._blocks]
        states = [dict(self.state.get(block.params[0], {})) for block in self._blocks]
        every = self.n if self.fisher in DENSE else self.n_inverse
        seen, self._found = self._found, found.Found()
        seen.enter(self._blocks, states, dampings, self.decay, self.steps % every < self.n)
        averages = {p: m for group in self.param_groups for p, m in descent.averaged(group, self.state).items()}
        directions = descent.directions(self._blocks, states, dampings, averages)
        rates = {p: float(group["lr"]) for p, group in home.items()}
        factor = 1.0
        if self.kl is not None:
            factor = descent.trust(self._blocks, states, dampings, averages, directions, rates, self.kl)
        for block, state in zip(self._blocks, states, strict=True):
            kept = self.state[block.params[0]]
            kept.update({name: t for name, t in state.items() if name not in ("step", "momentum")})
            kept["covers"] = _sizes(block)
            for p in block.params:
                self.state[p]["step"] = self.state[p].get("step", torch.zeros(())) + 1
        moves = {p: d for each in directions for p, d in each.items()}
        for group in self.param_groups:
            params, lr = [p for p in group["params"] if p in moves], float(group["lr"])
            if group["momentum"]:
                for p in params:
                    self.state[p]["momentum"] = averages[p]
            if group["weight_decay"]:
                vec.scale_(params, 1 - lr * group["weight_decay"])
            vec.add_(params, [moves[p].to(p.dtype) for p in params], -lr * factor)

    def _refreshes(self) -> bool:
        """Whether the curvature is due: by the count of steps, or since there is none of a parameter."""
        covered = {p for block in self._blocks for p in block.params}
        known = all(
            "covers" in (kept := self.state.get(block.params[0], {}))
            and kept["covers"].tolist() == _sizes(block).tolist()
            for block in self._blocks
        )
        return self.steps % self.n == 0 or not known or covered != set(self.trainable())

    def _prepare(self, batch: Batch) -> None:
        """Cut the parameters into blocks, as the model stands."""
        if batch.ranks.sharded:
            raise ValueError("the weights are sharded over ranks, and NaturalGradient needs whole layers: use "
                             "DistributedDataParallel")  # fmt: skip
        self._blocks, reasons = partition(
            batch.model,
            self.trainable(),
            self.fisher,
            self.group_of,
            sharing=self.sharing,
            norms=self.norms,
            form=self.form,
        )
        if reasons and reasons != self.fallback:
            told = "; ".join(f"{name} ({reason})" for name, reason in reasons.items())
            warnings.warn(f"{self.fisher} takes a diagonal Fisher matrix for {told}", UserWarning, stacklevel=3)
        self.fallback = reasons


def _sizes(block: Block) -> Tensor:
    """Return how many weights each parameter of a block has: what tells whether its state is still of the same."""
    return torch.tensor([p.numel() for p in block.params], dtype=torch.float32)


def _check(group: dict[str, Any]) -> None:
    """Refuse values of a parameter group that are out of range."""
    checks.non_negative(lr=float(group["lr"]), weight_decay=group["weight_decay"])
    checks.positive(damping=group["damping"])
    checks.below_one(momentum=group["momentum"])
