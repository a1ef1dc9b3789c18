"""How flat the minima of finished runs are: what `steppe sharpness` measures."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from steppe import curvature
from steppe.lab.components import components
from steppe.lab.measure import Progress, Task, measure
from steppe.lab.options import Sharpness
from steppe.lab.run import Run

__all__ = ["measure_sharpness"]

STEPS = 40
"""Lanczos steps of a spectrum."""
LIMIT, EXPECTED = 300, 20
"""Products that eigenvalues may take at most, and that they mostly do."""


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
    yield Task("surrogate gap", needs("rho"), 2, partial(_gap, what))
    yield Task("m-sharpness", needs("batch_size", "rho", "m"), 2, partial(_m_sharpness, what))
    yield Task("average rise", needs("noise", "draws"), 2 / 3 * what.draws, partial(_average, what))
    yield Task("eigenvalues", needs("eigenvalues", "tol"), 3 * EXPECTED, partial(_eigenvalues, k, what.tol))
    yield Task("trace", needs("products"), 2.2 * what.products, partial(_trace, what))
    yield Task("components", needs("tol"), 6 * 3 * EXPECTED / 2, partial(_components, network, what.tol))
    yield Task("spectrum", needs("spectra"), 3 * STEPS * what.spectra, partial(_spectrum, what))


def _eigenvalues(k: int, tol: float, objective: curvature.Objective, progress: Progress) -> dict[str, Any]:
    found = curvature.eigenvalues(
        curvature.Operator(objective),
        k,
        tol=tol,
        max_products=LIMIT,
        progress=lambda share: progress(min(1.0, share * LIMIT / EXPECTED)),
    )
    return {name: getattr(found, name).tolist() for name in ("values", "bounds", "converged")}


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
