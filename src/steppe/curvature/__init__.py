"""Flatness, measured: curvature, sharpness and loss landscapes of a trained model."""

from .activity import Activity, active_neurons
from .analyzer import Analyzer
from .average import AverageSharpness, average_sharpness
from .bound import Bound, pac_bayes
from .cosines import Cosines, cosines
from .diagonal import Diagonal, diagonal
from .eigenvalues import Eigenvalues, eigenvalues
from .filters import FilterNorms, filter_norms
from .landscape import Landscape, landscape
from .line import line
from .linearity import Linearity, linearity
from .ntk import Kernel, ntk
from .objective import Objective
from .operator import Operator
from .pictures import plot_landscapes
from .power import power
from .sharpness import MSharpness, SurrogateGap, m_sharpness, surrogate_gap
from .spectrum import Spectrum, spectrum
from .surface import write_surfaces
from .trace import Trace, trace

__all__ = [
    "Activity",
    "Analyzer",
    "AverageSharpness",
    "Bound",
    "Cosines",
    "Diagonal",
    "Eigenvalues",
    "FilterNorms",
    "Kernel",
    "Landscape",
    "Linearity",
    "MSharpness",
    "Objective",
    "Operator",
    "Spectrum",
    "SurrogateGap",
    "Trace",
    "active_neurons",
    "average_sharpness",
    "cosines",
    "diagonal",
    "eigenvalues",
    "filter_norms",
    "landscape",
    "line",
    "linearity",
    "m_sharpness",
    "ntk",
    "pac_bayes",
    "plot_landscapes",
    "power",
    "spectrum",
    "surrogate_gap",
    "trace",
    "write_surfaces",
]
