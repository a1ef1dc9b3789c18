"""Optimizers that look at curvature: each a `torch.optim.Optimizer` of its own, and a base for `SharpnessAware`."""
