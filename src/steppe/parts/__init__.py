"""The replaceable parts of a step: when, perturb, select and combine."""

from .combine import Amplified, Look, LossFirst, Mix, Orthogonal, Second, SecondOrder
from .perturb import Adaptive, Ascent, FilterNoise, Masked
from .schedules import Cosine, Linear, Piecewise, Sine
from .select import Another, Sharpest
from .sparse import DynamicSparse, FisherSparse
from .when import Always, Coin, Every, FollowLR

__all__ = [
    "Adaptive",
    "Always",
    "Amplified",
    "Another",
    "Ascent",
    "Coin",
    "Cosine",
    "DynamicSparse",
    "Every",
    "FilterNoise",
    "FisherSparse",
    "FollowLR",
    "Linear",
    "Look",
    "LossFirst",
    "Masked",
    "Mix",
    "Orthogonal",
    "Piecewise",
    "Second",
    "SecondOrder",
    "Sharpest",
    "Sine",
]
