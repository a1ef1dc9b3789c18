"""Optimizers that look at curvature: each a `torch.optim.Optimizer` of its own, and a base for `SharpnessAware`."""

from .adahessian import AdaHessian
from .natural import NaturalGradient
from .newton import NewtonCG

__all__ = ["AdaHessian", "NaturalGradient", "NewtonCG"]
