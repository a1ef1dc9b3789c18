"""Each sharpness-aware method once more, as plainly as the papers state it: the oracles of the tests."""

from .asam import ASAM
from .common import Reference
from .esam import ESAM, SDS, SWP
from .looksam import LookSAM
from .mix import GNR, GSAM, GSAMMinFH, GSAMPenalty, MixedSAM
from .rst import RST
from .rwp import RWP
from .sam import SAM, MSharpness
from .ssam import SSAMDynamic, SSAMFisher

__all__ = [
    "ASAM",
    "ESAM",
    "GNR",
    "GSAM",
    "RST",
    "RWP",
    "SAM",
    "SDS",
    "SWP",
    "GSAMMinFH",
    "GSAMPenalty",
    "LookSAM",
    "MSharpness",
    "MixedSAM",
    "Reference",
    "SSAMDynamic",
    "SSAMFisher",
]
