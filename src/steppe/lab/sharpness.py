"""How flat the minima of finished runs are: what `steppe sharpness` measures."""

import math
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

from steppe import curvature
from steppe.lab.components import components
from steppe.lab.measure import Progress, Task, measure
from steppe.lab.options import Sharpness
from steppe.lab.run import Run

__all__ = ["BETA", "measure_sharpness"]

STEPS = 40
"""Lanczos steps of a spectrum."""
LIMIT, EXPECTED, SMALLEST = 300, 20, 60
"""Products that eigenvalues may take at most, that the largest mostly do, and that the smallest do."""
BETA = 0.6
"""Share β of the parameter tensors that ESAM perturbs, by default."""


def measure_sharpness(runs: Sequence[Run], what: Sharpness, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Measure finished runs; the figures are kept in each run's folder, in sharpness.json, and not measured again.

    Args:
        runs: finished runs.
        what: options of the measurements.
        names: of the measurements, all by default.

    Returns:
        For each run, the figures of each measurement.

    Raises:
        ValueError: see `steppe.lab.measure.measure`.
        OSError: if a file cannot be written.
    """

    def tasks(run: Run) -> list[Task]:
        return [task for task in _tasks(what, run.config.model) if not names or task.name in names]

    return measure(runs, what, tasks, "sharpness.json")


def _tasks(what: Sharpness, network: str) -> Iterator[Task]:
    def needs(*options: str) -> dict[str, Any]:
        return {name: getattr(what, name) for name in ("examples", "split", "seed", *options)}

    k = what.eigenvalues
    yield Task("filters", {}, 0, _filters)
    yield Task("active neurons", needs(), 1 / 3, _active)
    yield Task("surrogate gap", needs("rho"), 2, partial(_gap, what))
    yield Task("m-sharpness", needs("batch_size", "rho", "m"), 2, partial(_m_sharpness, what))
    yield Task("average rise", needs("noise", "draws"), 2 / 3 * what.draws, partial(_average, what))
    yield Task("linearity", needs("batch_size", "rho"), 4 / 3, partial(_linearity, what))
    yield Task("linearity of picks", needs("batch_size", "rho", "draws"), 4 / 3 * what.draws, partial(_picks, what))
    yield Task("cosines", needs("batch_size", "rho"), 3.5, partial(_cosines, what))
    yield Task("PAC-Bayes bound", needs("rho"), 2, partial(_bound, what))
    yield Task("tangent kernel", needs("kernel"), what.kernel / 8, partial(_kernel, what))
    yield Task("eigenvalues", needs("eigenvalues", "tol"), 3 * EXPECTED, partial(_eigenvalues, k, what.tol))
    yield Task("trace", needs("products"), 2.2 * what.products, partial(_trace, what))
    yield Task("components", needs("tol"), 6 * 3 * EXPECTED / 2, partial(_components, network, what.tol))
    yield Task("spectrum", needs("spectra"), 3 * STEPS * what.spectra, partial(_spectrum, what))
    yield Task("smallest eigenvalues", needs("tol"), 3 * SMALLEST, partial(_smallest, what.tol))


def _eigenvalues(
    k: int,
    tol: float,
    objective: curvature.Objective,
    progress: Progress,
    which: Literal["largest", "smallest"] = "largest",
    expected: int = EXPECTED,
) -> dict[str, Any]:
    found = curvature.eigenvalues(
        curvature.Operator(objective),
        k,
        which,
        tol=tol,
        max_products=LIMIT,
        progress=lambda share: progress(min(1.0, share * LIMIT / expected)),
    )
    return {name: getattr(found, name).tolist() for name in ("values", "bounds", "converged")}


def _smallest(tol: float, objective: curvature.Objective, progress: Progress) -> dict[str, Any]:
    return _eigenvalues(2, tol, objective, progress, "smallest", SMALLEST)


def _components(network: str, tol: float, objective: curvature.Objective, progress: Progress) -> dict[str, Any]:
    parts = components(network, objective.model)
    found: dict[str, Any] = {}
    for name, pattern in parts.items():
        found[name] = _eigenvalues(
            1, tol, objective.only(pattern), lambda share: progress((len(found) + share) / len(parts))
        )
    return found


def _gap(what: Sharpness, objective: curvature.Objective, progress: Progress) -> dict[str, Any]:
    found = curvature.surrogate_gap(objective, what.rho, progress=progress)
    return {name: getattr(found, name) for name in ("loss", "gap", "slope", "sharpness", "curvature")}


def _m_sharpness(what: Sharpness, objective: curvature.Objective, progress: Progress) -> dict[str, Any]:
    found = curvature.m_sharpness(objective, what.rho, what.m, progress=progress)
    return {"value": found.sharpness, "error": found.error}


def _trace(what: Sharpness, objective: curvature.Objective, progress: Progress) -> dict[str, Any]:
    found = curvature.trace(curvature.Operator(objective), what.products, seed=what.seed, progress=progress)
    return {"value": found.value, "error": found.error}


def _average(what: Sharpness, objective: curvature.Objective, progress: Progress) -> dict[str, Any]:
    found = curvature.average_sharpness(
        objective, "filter", what.noise, draws=what.draws, seed=what.seed, progress=progress
    )
    return {"value": found.sharpness, "error": found.error}


def _spectrum(what: Sharpness, objective: curvature.Objective, progress: Progress) -> dict[str, Any]:
    matrix = curvature.Operator(objective)
    found = curvature.spectrum(matrix, STEPS, what.spectra, seed=what.seed, progress=progress)
    return {"nodes": found.nodes.tolist(), "weights": found.weights.tolist()}


def _filters(objective: curvature.Objective, progress: Progress) -> dict[str, Any]:
    return {name: norms.tolist() for name, norms in curvature.filter_norms(objective).norms.items()}


def _active(objective: curvature.Objective, progress: Progress) -> dict[str, Any]:
    found = curvature.active_neurons(objective, progress=progress)
    return {name: getattr(found, name) for name in ("shares", "neurons", "share")}


def _linearity(what: Sharpness, objective: curvature.Objective, progress: Progress) -> dict[str, Any]:
    found = curvature.linearity(objective, what.rho, progress=progress)
    return {"value": found.zeta, "error": found.error}


def _picks(what: Sharpness, objective: curvature.Objective, progress: Progress) -> dict[str, Any]:
    """ζ with ESAM's ε: mean over draws of the tensors that are picked."""

    def zeta(draw: int) -> float:
        return curvature.linearity(
            objective,
            what.rho,
            beta=BETA,
            seed=what.seed + draw,
            progress=lambda share: progress((draw + share) / what.draws),
        ).zeta

    found = [zeta(draw) for draw in range(what.draws)]
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan
    return {"value": statistics.fmean(found), "error": error}


def _cosines(what: Sharpness, objective: curvature.Objective, progress: Progress) -> dict[str, Any]:
    found = curvature.cosines(objective, what.rho, seed=what.seed, progress=progress)
    values = zip((found.sharpest, found.flattest, found.random), found.errors, strict=True)
    return {
        part: {"value": value, "error": error}
        for part, (value, error) in zip(("B⁺", "B⁻", "random"), values, strict=True)
    }


def _bound(what: Sharpness, objective: curvature.Objective, progress: Progress) -> dict[str, Any]:
    found = curvature.pac_bayes(objective, what.rho, progress=progress)
    return {name: getattr(found, name) for name in ("bound", "perturbed", "complexity", "examples", "delta")}


def _kernel(what: Sharpness, objective: curvature.Objective, progress: Progress) -> dict[str, Any]:
    found = curvature.ntk(objective, what.kernel, progress=progress)
    return {"condition": None if found.singular else found.condition, "eigenvalues": found.eigenvalues.tolist()}
