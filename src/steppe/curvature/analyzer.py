"""All measurements of one model on one set of data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..batch import LossFunction
from .activity import Activity, active_neurons
from .average import AverageSharpness, Noise, average_sharpness
from .bound import Bound, pac_bayes
from .cosines import Cosines, cosines
from .diagonal import Diagonal, diagonal
from .eigenvalues import Eigenvalues, Which, eigenvalues
from .filters import FilterNorms, filter_norms
from .landscape import Along, Landscape, landscape
from .line import line
from .linearity import Linearity, linearity
from .ntk import Kernel, ntk
from .objective import Objective
from .operator import Kind, Operator
from .params import Selection
from .power import power
from .products import Likelihood
from .progress import bar
from .sharpness import MSharpness, SurrogateGap, m_sharpness, surrogate_gap
from .spectrum import Spectrum, spectrum
from .still import Mode
from .trace import Trace, trace
from .walk import Accuracy


class Analyzer:
    """Measures the curvature and the sharpness of a trained model's loss, and draws its landscapes.

    Each method is one measurement, with a progress bar, and returns its values, their errors and its cost. The methods
    pass further keyword arguments on to the functions of the same names, whose docstrings say what is computed.
    The model is left as it was found: weights, buffers, mode, gradients, random generators.

    Args:
        model: the network, maybe inside ``torch.compile`` or ``DistributedDataParallel``.
        loss_fn: ``loss_fn(model, batch)`` returns the loss of each example, shape (B,), as in training; or their mean,
            where no measurement looks at single examples.
        loader: gives the same batches each time it is run through: a ``DataLoader`` that does not shuffle, or a list.
        params: the parameters to look at, all trainable ones by default: a regular expression, which is searched in
            their names; a module; or the parameters themselves.
        mode: ``"eval"``; or ``"train"``, in which normalisation layers use the batch (and hold their statistics) and
            every pass draws the same dropout masks.
        weights: ``weights(batch)`` returns the examples' weights ≥ 0, shape (B,); None for 1.
        max_batches: batches to be used of the loader; None for all.
        autocast: dtype of mixed precision for the forward passes, or None.
        group: the ranks that hold a shard of the data each; None for this process alone, or for those of a
            ``DistributedDataParallel`` model. All of them have to take part in every measurement.
        accuracy_fn: ``accuracy_fn(output, batch)`` returns 1 for each example that is right and 0 for the others, shape
            (B,), for landscapes; ``output`` is what the model returned to ``loss_fn``.
        seed: of all random draws.
        progress: whether to show bars, in a terminal.

    Raises:
        ValueError: if no parameter is chosen, or the loader cannot be run through again; from the measurements, if the
            loss is not finite or not twice differentiable, or the loader shuffles.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        loader: Iterable[Any],
        *,
        params: Selection = None,
        mode: Mode = "eval",
        weights: Callable[[Any], Tensor] | None = None,
        max_batches: int | None = None,
        autocast: torch.dtype | None = None,
        group: dist.ProcessGroup | None = None,
        accuracy_fn: Accuracy | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        self.objective = Objective(
            model,
            loss_fn,
            loader,
            params=params,
            mode=mode,
            weights=weights,
            max_batches=max_batches,
            autocast=autocast,
            group=group,
        )
        self.accuracy_fn, self.seed, self.progress = accuracy_fn, seed, progress

    def operator(
        self,
        kind: Kind = "hessian",
        *,
        params: Selection = None,
        draws: int | None = None,
        likelihood: Likelihood | None = None,
    ) -> Operator:
        """Return the Hessian or another curvature matrix, over all parameters or some, see `Operator`."""
        objective = self.objective if params is None else self.objective.only(params)
        return Operator(objective, kind, draws=draws, likelihood=likelihood, seed=self.seed)

    def eigenvalues(
        self,
        k: int = 1,
        *,
        which: Which = "largest",
        kind: Kind = "hessian",
        params: Selection = None,
        draws: int | None = None,
        likelihood: Likelihood | None = None,
        method: Literal["lanczos", "power"] = "lanczos",
        **how: Any,
    ) -> Eigenvalues:
        """Return the largest eigenvalues (or the smallest, or those largest in magnitude), see `eigenvalues`.

        ``method="power"``, power iteration, is the cross-check for the first.
        """
        if method not in ("lanczos", "power"):
            raise ValueError(f'method={method!r} is neither "lanczos" nor "power"')
        matrix = self.operator(kind, params=params, draws=draws, likelihood=likelihood)
        with bar(f"{k} eigenvalues" if k > 1 else "eigenvalue", self.progress) as progress:
            if method == "power":
                if k != 1 or which == "smallest":
                    raise ValueError('method="power" finds one eigenvalue, the largest: leave k and which out')
                return power(matrix, which, seed=self.seed, progress=progress, **how)
            return eigenvalues(matrix, k, which, seed=self.seed, progress=progress, **how)

    def eigenvalues_by(self, module: str | Mapping[str, str], k: int = 1, **how: Any) -> dict[str, Eigenvalues]:
        r"""Return the eigenvalues of diagonal blocks of the matrix, and of the ``"whole"``.

        Args:
            module: a regular expression, as ``r"blocks\.\d+"``: each module whose whole name it matches is a block; or
                a regular expression for each block, to be searched in the names of the parameters.
            k: how many of each.
            how: as for `eigenvalues`.

        Raises:
            ValueError: if nothing matches.

        Source:
            Chen et al. 2022, "When vision transformers outperform ResNets without pretraining or strong data
            augmentations", table 3.
        """
        blocks = {**(self._modules(module) if isinstance(module, str) else module), "whole": None}
        return {name: self.eigenvalues(k, params=params, **how) for name, params in blocks.items()}

    def spectrum(
        self,
        steps: int = 80,
        draws: int = 10,
        *,
        kind: Kind = "hessian",
        params: Selection = None,
        likelihood: Likelihood | None = None,
        **how: Any,
    ) -> Spectrum:
        """Return the spectral density, see `spectrum`."""
        with bar("spectrum", self.progress) as progress:
            matrix = self.operator(kind, params=params, likelihood=likelihood)
            return spectrum(matrix, min(steps, matrix.size), draws, seed=self.seed, progress=progress, **how)

    def trace(
        self, *, kind: Kind = "hessian", params: Selection = None, likelihood: Likelihood | None = None, **how: Any
    ) -> Trace:
        """Return the trace, see `trace`."""
        with bar("trace", self.progress) as progress:
            matrix = self.operator(kind, params=params, likelihood=likelihood)
            return trace(matrix, seed=self.seed, progress=progress, **how)

    def diagonal(
        self, *, kind: Kind = "hessian", params: Selection = None, likelihood: Likelihood | None = None, **how: Any
    ) -> Diagonal:
        """Return the diagonal, see `diagonal`."""
        with bar("diagonal", self.progress) as progress:
            matrix = self.operator(kind, params=params, likelihood=likelihood)
            return diagonal(matrix, seed=self.seed, progress=progress, **how)

    def surrogate_gap(self, rho: float = 0.05, **how: Any) -> SurrogateGap:
        """Return ``h = L(w+ε) − L(w)`` and ``2h/ρ²``, see `surrogate_gap`."""
        with bar("surrogate gap", self.progress) as progress:
            return surrogate_gap(self.objective, rho, progress=progress, **how)

    def m_sharpness(self, rho: float, m: int, **how: Any) -> MSharpness:
        """Return the mean worst rise of the loss of m examples, see `m_sharpness`."""
        with bar("m-sharpness", self.progress) as progress:
            return m_sharpness(self.objective, rho, m, progress=progress, **how)

    def average_sharpness(self, noise: Noise = "filter", deviation: float = 0.01, **how: Any) -> AverageSharpness:
        """Return the mean rise of the loss under Gaussian noise, see `average_sharpness`."""
        with bar("average sharpness", self.progress) as progress:
            return average_sharpness(self.objective, noise, deviation, seed=self.seed, progress=progress, **how)

    def linearity(self, rho: float = 0.05, **how: Any) -> Linearity:
        """Return ESAM's ``ζ = |L(w+ε) − L(w) − εᵀ∇L(w)|``, see `linearity`."""
        with bar("linearity", self.progress) as progress:
            return linearity(self.objective, rho, seed=self.seed, progress=progress, **how)

    def cosines(self, rho: float = 0.05, **how: Any) -> Cosines:
        """Return the cosines of the gradients on ESAM's B⁺, B⁻ and a random subset with the batch's, see `cosines`."""
        with bar("cosines", self.progress) as progress:
            return cosines(self.objective, rho, seed=self.seed, progress=progress, **how)

    def pac_bayes(self, rho: float = 0.05, **how: Any) -> Bound:
        """Return SAM's PAC-Bayes bound, see `pac_bayes`."""
        with bar("PAC-Bayes bound", self.progress) as progress:
            return pac_bayes(self.objective, rho, progress=progress, **how)

    def ntk(self, examples: int = 16, **how: Any) -> Kernel:
        """Return the neural tangent kernel's eigenvalues and condition number, see `ntk`."""
        with bar("tangent kernel", self.progress) as progress:
            return ntk(self.objective, examples, progress=progress, **how)

    def active_neurons(self) -> Activity:
        """Return the share of active neurons of each layer, see `active_neurons`."""
        with bar("active neurons", self.progress) as progress:
            return active_neurons(self.objective, progress=progress)

    def filter_norms(self) -> FilterNorms:
        """Return the norms of the filters of each layer, see `filter_norms`."""
        return filter_norms(self.objective)

    def landscape(
        self, dims: int = 2, directions: Along = "filter", points: int = 41, radius: float = 1.0, **how: Any
    ) -> Landscape:
        """Return the loss on a line or in a plane around the weights, see `landscape`."""
        with bar("landscape", self.progress) as progress:
            return landscape(
                self.objective,
                dims=dims,
                directions=directions,
                points=points,
                radius=radius,
                accuracy_fn=self.accuracy_fn,
                seed=self.seed,
                progress=progress,
                **how,
            )

    def line(self, other: Mapping[str, Tensor], **how: Any) -> Landscape:
        """Return the loss between the model and another checkpoint, see `line`."""
        with bar("line", self.progress) as progress:
            return line(self.objective, other, accuracy_fn=self.accuracy_fn, progress=progress, **how)

    def _modules(self, pattern: str) -> dict[str, Selection]:
        model = self.objective.model
        found = {
            name: module
            for name, module in model.named_modules()
            if name and re.fullmatch(pattern, name) and next(module.parameters(), None) is not None
        }
        if not found:
            some = ", ".join([name for name, _ in model.named_modules() if name][:3])
            raise ValueError(f"no module's name is matched by {pattern!r}; there are {some}, ...")
        return dict(found)
