"""What is measured on finished runs, and how well; the commands read it from the command line."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Landscapes", "Sample", "Sharpness"]


@dataclass(frozen=True)
class Sample:
    """The images that networks are measured on."""

    examples: int = 1024
    """Number of images, without augmentation: the first in an order that all runs share, or all there are."""
    batch_size: int = 256
    """Images that a network sees at a time."""
    split: Literal["train", "test"] = "train"
    """Training images with the labels that were trained on, or test images."""
    device: str | None = None
    """Where to measure: cpu, cuda or cuda:N; by default where the run was trained."""
    seed: int = 0
    """Fixes the order of the images and all draws."""


@dataclass(frozen=True)
class Sharpness(Sample):
    """What is measured, and how well."""

    eigenvalues: int = 5
    """Number of largest Hessian eigenvalues; λmax/λ5 needs 5."""
    tol: float = 1e-3
    """Bound of an eigenvalue's error to be reached, relative to the eigenvalue."""
    rho: float = 0.05
    """Radius ρ of the ascent in the surrogate gap, m-sharpness, ζ, the cosines and the PAC-Bayes bound."""
    m: int = 128
    """Images in a group of m-sharpness."""
    noise: float = 0.01
    """Size γ of the noise of average-direction sharpness, relative to each filter's norm."""
    draws: int = 10
    """Draws of that noise, and of the tensors that ESAM's ζ perturbs."""
    products: int = 30
    """Hessian products to estimate the trace from."""
    spectra: int = 1
    """Random vectors to estimate a spectral density from, each at the price of 40 Hessian products."""
    kernel: int = 16
    """Images of the neural tangent kernel, which has a row for each of them and each class."""


@dataclass(frozen=True)
class Landscapes(Sample):
    """What is drawn."""

    directions: Literal["filter", "adversarial", "eigenvectors", "line"] = "filter"
    """Filter-normalised Gaussian directions; the gradients of two halves of the images; the Hessian's first
    eigenvectors; or the line from the first run to each of the others."""
    dims: tuple[Literal[1, 2], ...] = (1, 2)
    """1 for curves, 2 for maps and surfaces; a line has 1."""
    points: int = 25
    """Points along each axis; with an odd number the trained weights are one of them."""
    radius: float = 1.0
    """How far the axes reach: in norms of the weights' filters, or as a distance for the other directions."""
    draws: int = 5
    """Random directions that a curve is the mean of. A map has one pair."""
