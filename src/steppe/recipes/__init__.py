"""The methods of the literature, one function each, and the schedules of RST."""

from .esam import esam, esam_sds, esam_swp
from .gap import gnr, gsam, gsam_min, gsam_penalty
from .looksam import looksam
from .rst import cosine, grst, linear, piecewise, rst, sine
from .rwp import rwp
from .sam import asam, m_sharpness, mixed_sam, sam, sgd
from .ssam import ssam, ssam_dynamic

__all__ = [
    "asam",
    "cosine",
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
    "piecewise",
    "rst",
    "rwp",
    "sam",
    "sgd",
    "sine",
    "ssam",
    "ssam_dynamic",
]
