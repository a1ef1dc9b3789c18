"""The passes of a step on one source of gradients, and the direction that the method makes of them."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from . import groups, products, rounding, split, vec
from .batch import Batch
from .closure import Closure
from .method import Method
from .others import Others
from .point import Point
from .second_order import SecondOrder
from .stats import Stats
from .vec import Vec
from .wrapper import Wrapper

Source = Batch | Closure


class Passes(Wrapper):
    """A wrapper that leaves a method's direction in ``.grad``, and counts the passes that it takes."""

    method: Method
    split: bool
    rounding: rounding.Rounding
    scaler: torch.amp.GradScaler | None
    stats: Stats
    _others: Others

    def _direction(
        self,
        at: Point,
        source: Source,
        second: Batch | None,
        rho: float | None,
        *,
        share: float,
        local: bool,
        reduce: bool,
    ) -> list[Tensor]:
        """Leave the method's direction on one source in ``.grad``, and return the mean losses of the passes.

        ``share`` is the source's share of the step, for the base to weigh its curvature by.
        """
        method, params, ranks = self.method, at.memory.params, source.ranks
        perturb, combine, select = method.perturb, method.combine, method.select
        for p in self.params():
            p.grad = None
        apart = bool(rho) and self.split and ranks.world > 1
        if apart:
            ranks.check_by_hand()
        perturbed, weight = split.share(method, ranks.rank, ranks.world) if apart else (True, 1.0)
        picked = self._picked(at, params) if rho and perturbed else None
        if not rho or not perturbed or picked == []:
            at.rho = rho if apart and rho else 0.0
            loss = self._run(source, None, reduce=reduce, weight=weight, look=share).mean()
            if rho is None:
                self._combine(at, params, [p.grad for p in params], None, source, local)
            return [loss]

        at.rho = rho
        squares = self._squares(source, params, perturb.fisher_examples(at.step))
        early, late = (share, 0.0) if isinstance(self.base, SecondOrder) and self.base.at == "weights" else (0.0, share)
        first = method.needs_first and not apart
        before = self._run(source, picked, reduce=not local, look=early) if first else None
        looked = not first and self._looks(early)
        if looked:
            before = self._run(source, [], look=early)
        slopes = _take(params, copy=ranks.shared_buffers and combine.needs_g0)
        radii = groups.radii(self.base)
        if combine.needs_product and set(radii.values()) - {rho}:
            raise ValueError(
                f"{combine!r} has one radius for all weights: no parameter group may have a rho of its own"
            )
        climbs = [
            (g is not None or not perturb.needs_g0) and radii.get(p, rho) > 0
            for p, g in zip(params, slopes, strict=True)
        ]
        at.memory.params = at.w = moved = [p for p, climb in zip(params, climbs, strict=True) if climb]
        at.g0 = [g for g, climb in zip(slopes, climbs, strict=True) if climb and g is not None]
        at.squares = [t for t, climb in zip(squares, climbs, strict=True) if climb] if squares else []
        at.names = self.names(moved, source.names()) if perturb.needs_names else []
        at.spare = not combine.needs_g0
        doubtful = 0 * vec.norm(at.g0) if self._active() is not None else None
        if at.spare:
            slopes = [None] * len(params)
        home = vec.clone(moved)
        with ExitStack() as stack:
            stack.callback(ranks.reshard)
            stack.callback(vec.copy_, moved, home)
            low = rounding.is_low(moved)
            if low and self.rounding == "float32":
                assert isinstance(source, Batch)
                stack.enter_context(source.widened())
            self._climb(at, moved, radii, low, 0)
            at.w, at.spare = home, True
            for inner in range(1, perturb.passes):
                self._run(source, picked, again=True, reduce=not local)
                found = dict(zip(params, _take(params), strict=True))
                at.g0 = [torch.zeros_like(p) if (g := found[p]) is None else g for p in moved]
                self._climb(at, moved, radii, low, inner)
            at.g0 = []
            rows = None
            if select is not None and select.needs_rise:
                assert before is not None
                assert isinstance(source, Batch)
                rise = source.losses() - before
                self.stats.count(source.size, backward=0)
                rows, weight = (select(rise), 1.0) if local else ranks.choose(select, rise)
            again = looked or method.needs_first
            whole = reduce and not (local and combine.needs_g0)
            if second is not None:
                assert isinstance(source, Batch)
                second.follow(source)
            after = self._run(second or source, None, rows=rows, again=again, reduce=whole, weight=weight, look=late)
            taken = _take(params)
        at.w = []
        del home
        gradients = [
            g if g is None or g.dtype == p.dtype else g.to(p.dtype) for p, g in zip(params, taken, strict=True)
        ]
        if apart:
            for p, g in zip(params, gradients, strict=True):
                p.grad = g
        else:
            self._combine(at, params, slopes, gradients, source, local)
        if doubtful is not None:
            self._doubt(params, [doubtful])
        return [losses.mean() for losses in (before, after) if losses is not None]

    def _doubt(self, params: Vec, gradients: Vec) -> None:
        """Let the scaler, which looks at the direction only, see whether these gradients overflowed."""
        for direction in vec.local([p.grad for p in params if p.grad is not None])[:1]:
            direction.add_((0 * vec.norm(gradients)).to(direction.device))

    def _picked(self, at: Point, params: Vec) -> Vec | None:
        """Return the parameters that pass one differentiates; None for all of them."""
        picks = self.method.perturb.picks(at, len(params))
        radii = groups.radii(self.base)
        if 0 in radii.values() and not self.method.combine.needs_g0:
            picks = [pick and radii.get(p) != 0 for p, pick in zip(params, picks or [True] * len(params), strict=True)]
        return None if picks is None else [p for p, pick in zip(params, picks, strict=True) if pick]

    def _masks(self) -> bool:
        """Whether pass one may differentiate a part of the parameters only."""
        frozen = 0 in groups.radii(self.base).values() and not self.method.combine.needs_g0
        return frozen or self.method.perturb.share < 1

    def _climb(self, at: Point, moved: Vec, radii: dict[Tensor, float], low: bool, inner: int) -> None:
        """Move the weights by ε, each group by its own share of it."""
        vector, factor = self.method.perturb(at, at.rho / self.method.perturb.passes)
        shares: dict[float, list[int]] = {}
        for i, p in enumerate(moved):
            shares.setdefault(radii.get(p, at.rho) / at.rho, []).append(i)
        measured = []
        for number, (share, members) in enumerate(shares.items()):
            u, v = [moved[i] for i in members], [vector[i] for i in members]
            if low:
                draw = partial(at.generator, f"rounding/{inner}/{number}") if self.rounding == "stochastic" else None
                measured.append(rounding.add_(u, v, factor * share, draw))
            else:
                vec.add_(u, v, factor * share)
        if low:
            self.stats.measure(torch.stack(measured).sum(0).tolist(), inner)

    def _combine(
        self, at: Point, params: Vec, g0: list[Tensor | None], g1: list[Tensor | None] | None, source: Source, own: bool
    ) -> None:
        """Leave ``combine``'s direction in ``.grad``; a gradient that only one pass has counts as 0 in the other.

        ``own`` is whether the rank makes a direction of its own.
        """
        combine = self.method.combine
        with_g0 = combine.needs_g0 or g1 is None
        both = list(zip(params, g0 if with_g0 else [None] * len(params), g1 or [None] * len(params), strict=True))
        used = [(p, a, b) for p, a, b in both if a is not None or b is not None]
        at.memory.params = at.w = [p for p, _, _ in used]
        if with_g0:
            at.g0 = [torch.zeros_like(p) if a is None else a for p, a, _ in used]
        second = None if g1 is None else [torch.zeros_like(p) if b is None else b for p, _, b in used]
        if combine.needs_product and second is not None:
            assert isinstance(source, Batch)
            at.product = products.hessian_product(source, at.w, combine.probe(at, second), self._active())
            if not own:
                source.ranks.mean_(at.product)
            self.stats.count(source.size, backward=4)
        for p, direction in zip(at.w, combine(at, second), strict=True):
            p.grad = direction

    def _squares(self, source: Source, params: Vec, wanted: int) -> Vec:
        """Return ``Σᵢ (∇ℓᵢ)²`` over the first examples of all ranks together."""
        if not wanted or not isinstance(source, Batch):
            return []
        ranks = source.ranks
        here = min(max(wanted - ranks.rank * source.size, 0), source.size)
        self.stats.count(here)
        squares = products.squared_gradients(source, params, here)
        if ranks.ddp is not None:
            ranks.mean_(squares)
            vec.scale_(squares, ranks.world)
        return squares

    def _run(
        self,
        source: Source,
        picked: Vec | None,
        *,
        rows: Tensor | None = None,
        again: bool = False,
        reduce: bool = True,
        weight: float = 1.0,
        look: float = 0.0,
    ) -> Tensor:
        """Run one pass, count it, and return the losses.

        ``look`` is the share of the step for which the base sees its curvature in this pass, if it is due.
        """
        self._others.clear()
        scaler = self._active()
        size = source.size if rows is None else len(rows)
        share = sum(p.numel() for p in picked) / sum(p.numel() for p in self.trainable()) if picked is not None else 1.0
        if self._looks(look):
            assert isinstance(self.base, SecondOrder)
            assert isinstance(source, Batch)
            losses = self.base.backward(
                source, picked, share=look, rows=rows, again=again, reduce=reduce, weight=weight, scaler=scaler
            )
            self.stats.count(size)
            self.stats.count(size, forward=self.base.extra[0], backward=self.base.extra[1])
        else:
            losses = source.backward(picked, rows=rows, again=again, reduce=reduce, weight=weight, scaler=scaler)
            self.stats.count(size, share=share, backward=int(share > 0))
        if picked and reduce and not source.ranks.sharded:
            source.ranks.mean_gradients(picked)
        return losses

    def _looks(self, share: float) -> bool:
        """Whether the base sees its curvature in a pass that has such a share of the step."""
        return share > 0 and isinstance(self.base, SecondOrder) and self.base.is_due()

    def _active(self) -> torch.amp.GradScaler | None:
        """Return the scaler, if it is one that scales."""
        return self.scaler if self.scaler is not None and self.scaler.is_enabled() else None


def _take(params: Vec, *, copy: bool = False) -> list[Tensor | None]:
    """Return the gradients by reference or as copies, and leave none.

    Raises:
        ValueError: if one is sparse.
    """
    slopes = [p.grad for p in params]
    for i, p in enumerate(params):
        if p.grad is not None and p.grad.layout != torch.strided:
            raise ValueError(
                f"parameter {i} of shape {tuple(p.shape)} has a sparse gradient, which no perturbation can use: "
                "build the layer with sparse=False"
            )
        p.grad = None
    return [None if g is None else g.clone() if copy else g for g in slopes]
