"""Figures of flatness as the cells of tables, and what the columns are."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from steppe.lab.options import Sharpness
from steppe.lab.report import MISSING
from steppe.lab.run import Run
from steppe.lab.sharpness import BETA
from steppe.lab.stats import estimate

__all__ = ["ACTIVE", "Figure", "active", "eigenvalue", "explained", "further", "legend", "over", "overview", "text"]


class Figure(NamedTuple):
    """A measured number."""

    value: float
    error: float = math.nan
    """Half the width of where it lies, if that is known."""
    converged: bool = True


def overview(found: Mapping[str, Any]) -> dict[str, Figure | None]:
    """What the first table says of one run, by the titles of its columns."""
    eigenvalues, gap = found["eigenvalues"], found["surrogate gap"]
    last = min(5, len(eigenvalues["values"]))
    return {
        "λmax": eigenvalue(eigenvalues),
        **({f"λ{last}": eigenvalue(eigenvalues, last), f"λmax/λ{last}": _ratio(eigenvalues, last)} if last > 1 else {}),
        "surrogate gap": Figure(gap["gap"]),
        "2h/ρ²": Figure(gap["sharpness"]),
        "2(h − slope)/ρ²": Figure(gap["curvature"]),
        **{name: Figure(**found[name]) for name in ("m-sharpness", "average rise", "trace") if name in found},
    }


def further(found: Mapping[str, Any]) -> dict[str, Figure | None]:
    """What the second table says of one run."""
    smallest, cosines, condition = found["smallest eigenvalues"], found["cosines"], found["tangent kernel"]["condition"]
    return {
        "λmin": eigenvalue(smallest),
        "λn−1": eigenvalue(smallest, 2),
        "ζ": Figure(**found["linearity"]),
        f"ζ, β = {BETA:g}": Figure(**found["linearity of picks"]),
        **{f"cos {part}": Figure(**cosines[part]) for part in cosines},
        "PAC-Bayes bound": Figure(found["PAC-Bayes bound"]["bound"]),
        "NTK κ": None if condition is None else Figure(condition),
    }


def active(found: Mapping[str, Any]) -> dict[str, Figure]:
    """Share of active neurons in per cent, in each module that runs activations itself, and in the whole network."""
    sums: dict[str, list[float]] = {}
    for name, share in found["shares"].items():
        module, _, function = name.partition("#")[0].partition(":")
        neurons = found["neurons"][name]
        total = sums.setdefault(module or function, [0.0, 0])
        total[:] = total[0] + share * neurons, total[1] + neurons
    layers = {layer: Figure(100 * active / neurons) for layer, (active, neurons) in sums.items()}
    return {**layers, "whole": Figure(100 * found["share"])}


def eigenvalue(found: Mapping[str, Any], number: int = 1) -> Figure:
    """One of the eigenvalues of a matrix with its bound, the first by default."""
    return Figure(*(found[name][number - 1] for name in ("values", "bounds", "converged")))


def _ratio(found: Mapping[str, Any], number: int) -> Figure | None:
    first, other = eigenvalue(found), eigenvalue(found, number)
    if other.value <= 0:
        return None
    ratio = first.value / other.value
    error = ratio * (first.error / first.value + other.error / other.value)
    return Figure(ratio, error, first.converged and other.converged)


def text(figures: Sequence[Figure | None]) -> str:
    """A cell: one figure with its error, or the mean of several with half its 95 % interval.

    Figures that did not converge are said not to have, and those that do not exist are left out.
    """
    known = [figure for figure in figures if figure is not None]
    if not known:
        return MISSING
    mean, half, n = estimate([figure.value for figure in known])
    error, digits = (known[0].error, 1) if half is None else (half, 2)
    words = _number(mean, 4) + ("" if math.isnan(error) else f" ± {_number(error, digits)}")
    if len(known) < len(figures):
        words += f" ({n} of {len(figures)})"
    if lacking := sum(not figure.converged for figure in known):
        words += " (not converged)" if n == 1 else f" ({lacking} of {n} not converged)"
    return words


def over(pairs: Sequence[tuple[Figure | None, Figure | None]]) -> str:
    """A cell: the geometric mean of ratios, with its 95 % interval if there are several; all numbers above 0."""
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not known or min(min(a.value, b.value) for a, b in known) <= 0:
        return MISSING
    mean, half, n = estimate([math.log(a.value / b.value) for a, b in known])
    words = f"{math.exp(mean):.2f}"
    if half is not None:
        words += f" ({math.exp(mean - half):.2f} to {math.exp(mean + half):.2f})"
    if n < len(pairs):
        words += f", {n} of {len(pairs)}"
    if lacking := sum(not (a.converged and b.converged) for a, b in known):
        words += f", {lacking} not converged"
    return words


def _number(x: float, digits: int) -> str:
    """A number with so many digits, without an exponent where it can be read without."""
    if x == 0 or not math.isfinite(x):
        return f"{x:g}"
    size = math.floor(math.log10(abs(x)))
    return f"{x:.{max(0, digits - 1 - size)}f}" if -5 <= size < 6 else f"{x:.{digits - 1}e}"


LEGEND = """
Flatness is measured on at most {examples} {images}, without augmentation, in eval mode.
With one seed, ± is the error of the measurement: the bound of an eigenvalue's residual, else a standard error.
With several it is half a 95 % t-interval over seeds.
"""
EXPLAINED = {
    "λmax": "λmax is the Hessian's largest eigenvalue. One whose bound is above {tol:g} of itself has not converged.",
    "surrogate gap": "The surrogate gap is h = L(w + ε) − L(w) with SAM's ε = ρ∇L/‖∇L‖, ρ = {rho:g}.",
    "2h/ρ²": "At a minimum, 2h/ρ² is about λmax; elsewhere h is mostly slope εᵀ∇L, without which is the next column.",
    "m-sharpness": "m-sharpness is the mean rise of the loss of m = {m} images, each such group at an ε of its own.",
    "average rise": "The average rise of the loss is under Gaussian noise of {noise:g} times each filter's norm.",
    "λmin": "λmin and λn−1 are the Hessian's smallest eigenvalues: below 0, the loss bends down in some direction.",
    "ζ": "ζ = |L(w + ε) − L(w) − εᵀ∇L| is how far a batch's loss is from linear along SAM's ε.",
    f"ζ, β = {BETA:g}": "With β, ε is ESAM's: (ρ/β) g/‖g‖ over tensors picked with chance β; mean of {draws} draws.",
    "cos B⁺": "cos is that of a gradient at w + ε with the batch's: of the half B⁺ whose loss ε raises the most, of "
    "the half B⁻ that it raises the least, and of a random half.",
    "PAC-Bayes bound": "The PAC-Bayes bound on the loss of all images is SAM's theorem 2 for this sample. At 1 or more "
    "it says nothing (vacuous); and it is proved for losses in [0, 1] only, which cross-entropy is not.",
    "NTK κ": "NTK κ is λmax/λmin of the neural tangent kernel of {kernel} images and all classes; — if it is singular.",
}
ACTIVE = """
A neuron of an activation is active where its input is positive. Means over images, by the module that runs it.
"""


def legend(runs: Sequence[Run], what: Sharpness, titles: Sequence[str]) -> str:
    """What was measured, and what the columns are."""
    noisy = any(run.config.label_noise for run in runs)
    images = {"train": "training images" + ", with the noisy labels of training" * noisy, "test": "test images"}
    return LEGEND.format(examples=what.examples, images=images[what.split]) + explained(what, titles)


def explained(what: Sharpness, titles: Sequence[str]) -> str:
    """What the columns are."""
    lines = (f"{words}\n" for title, words in EXPLAINED.items() if title in titles)
    return "".join(lines).format(**asdict(what)) + "\n"
