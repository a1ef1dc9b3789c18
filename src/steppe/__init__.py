"""Train neural networks into flat minima at close to the price of plain SGD."""

from importlib.metadata import version as _version

from . import curvature, optim, recipes
from .batch import Batch
from .groups import norm_layers_only
from .method import Method
from .recipes import (
    asam,
    cosine,
    esam,
    esam_sds,
    esam_swp,
    gnr,
    grst,
    gsam,
    gsam_min,
    gsam_penalty,
    linear,
    looksam,
    m_sharpness,
    mixed_sam,
    piecewise,
    rst,
    rwp,
    sam,
    sgd,
    sine,
    ssam,
    ssam_dynamic,
)
from .stats import Stats
from .step import SharpnessAware
from .text import parse

__version__ = _version("steppe")

__all__ = [
    "Batch",
    "Method",
    "SharpnessAware",
    "Stats",
    "__version__",
    "asam",
    "cosine",
    "curvature",
    "esam",
    "esam_sds",
    "esam_swp",
    "gnr",
    "grst",
    "gsam",
    "gsam_min",
    "gsam_penalty",
    "linear",
    "looksam",
    "m_sharpness",
    "mixed_sam",
    "norm_layers_only",
    "optim",
    "parse",
    "piecewise",
    "recipes",
    "rst",
    "rwp",
    "sam",
    "sgd",
    "sine",
    "ssam",
    "ssam_dynamic",
]
