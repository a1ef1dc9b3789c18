"""Layers that keep statistics of what they see: held in further passes, moved once by a pass in micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

Hold: TypeAlias = Callable[[Any], AbstractContextManager[Any]]
Change: TypeAlias = tuple[object, str, Any]
"""An object, and the value that one of its attributes is to have."""


@contextmanager
def held(model: nn.Module, hold: Hold | None = None) -> Iterator[None]:
    """Normalise by the batch and leave the statistics alone, the counter of batches included.

    Known are torch's batch, synchronised-batch and instance norms, what derives from them, and both spectral norms,
    whose power iteration rests. Layers in eval mode are left as they are.

    Args:
        model: the network.
        hold: ``hold(model)`` returns a context manager that holds the layers torch does not know.
    """
    resting = [change for module in model.modules() if _is_known(module) for change in holding(module)]
    with _changed(resting), nullcontext() if hold is None else hold(model):
        yield


@contextmanager
def pooled(model: nn.Module, sizes: Sequence[int], hold: Hold | None = None) -> Iterator[Callable[[int], None]]:
    """Move the statistics once by a pass in micro-batches, by those of the whole batch.

    ``mean = Σ wᵢ meanᵢ`` and ``var = Σ wᵢ (varᵢ + (meanᵢ − mean)²)`` with ``wᵢ = Bᵢ/B``. In the first layer, ``mean``
    is the whole batch's, and so are both in instance norms. Torch's varᵢ has Bessel's correction: for k equal
    micro-batches of a batch with n values a channel, ``var`` is 1 − 1/n to 1 + (k − 1)/(n − k) times the whole batch's.
    Deeper layers see what was normalised by the micro-batch.

    Args:
        model: the network.
        sizes: examples of each micro-batch. With only one, torch moves the statistics as ever.
        hold: as for ``held``; what torch does not know moves in the first micro-batch, and is held in the others.

    Returns:
        A function to be called with i = 0, 1, ... before micro-batch i. If one of them fails, the statistics are put
        back.
    """
    if len(sizes) == 1:
        yield lambda i: None
        return
    norms = _tracking(model)
    start = [_statistics(norm) for norm in norms]
    ends: list[list[list[Tensor]]] = []
    with ExitStack() as stack:

        def before(i: int) -> None:
            if i == 0:
                return
            if i == 1:
                stack.enter_context(_held_others(model, hold))
            ends.append([_statistics(norm) for norm in norms])
            _put_back(norms, start)

        try:
            yield before
        except BaseException:
            _put_back(norms, start)
            raise
        ends.append([_statistics(norm) for norm in norms])
    shares = [size / sum(sizes) for size in sizes]
    for norm, first, *last in zip(norms, start, *ends, strict=True):
        _put_back([norm], [_pool(norm, first, last, shares)])


def _pool(norm: _NormBase, start: list[Tensor], ends: list[list[Tensor]], shares: list[float]) -> list[Tensor]:
    """Return the pooled mean, variance and count, from those that each micro-batch alone led to.

    Both averages move by ``m`` times the new value, an affine map, so the mean of the ends is the end of the means; the
    term between micro-batches is ``m Σ wᵢ (meanᵢ − mean)² = Σ wᵢ (endᵢ − end)²/m``.
    """
    means, variances, counts = (torch.stack(each) for each in zip(*ends, strict=True))
    w = torch.tensor(shares, dtype=means.dtype, device=means.device).unsqueeze(1)
    mean, variance = (w * means).sum(0), (w * variances).sum(0)
    momentum = 1 / (start[2].to(mean) + 1) if norm.momentum is None else norm.momentum
    if norm.momentum != 0 and not isinstance(norm, _InstanceNorm):  # which averages over examples: nothing between
        variance += (w * (means - mean).square()).sum(0) / momentum
    return [mean, variance, counts.amax(0)]


def _tracking(model: nn.Module) -> list[_NormBase]:
    """Return the layers whose running averages a pass would move."""
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    return [norm for norm in norms if norm.running_mean is not None]


def _statistics(norm: _NormBase) -> list[Tensor]:
    return [t.clone() for t in (norm.running_mean, norm.running_var, norm.num_batches_tracked)]  # type: ignore[union-attr]


def _put_back(norms: Sequence[_NormBase], statistics: Sequence[list[Tensor]]) -> None:
    for norm, (mean, variance, count) in zip(norms, statistics, strict=True):
        norm.running_mean.copy_(mean)  # type: ignore[union-attr]
        norm.running_var.copy_(variance)  # type: ignore[union-attr]
        norm.num_batches_tracked.copy_(count)  # type: ignore[union-attr]


def _is_known(module: nn.Module) -> bool:
    """Whether a layer may keep statistics, itself or by a hook; most do not."""
    known = (_NormBase, _SpectralNorm, torch.jit.ScriptModule)
    return isinstance(module, known) or bool(module._forward_pre_hooks)


def holding(module: nn.Module) -> list[Change]:
    """Return what holds a layer's statistics.

    Torch's instance norms move their averages whatever their flag says, so they lose them.

    Raises:
        ValueError: if the layer was scripted, and so cannot be held, and moves its averages.
    """
    if isinstance(module, torch.jit.ScriptModule):
        if any(m.training and getattr(m, "running_mean", None) is not None for m in module.modules()):
            raise ValueError("a scripted network moves its running statistics in every pass: train the network that "
                             "torch.jit.script was given, or use torch.compile")  # fmt: skip
        return []
    if not isinstance(module, _NormBase):
        return _holding_power(module)
    if not (module.training and module.track_running_stats) or module.running_mean is None:
        return []
    averages = ("running_mean", "running_var") if isinstance(module, _InstanceNorm) else ()
    return [(module, "track_running_stats", False), *((module, name, None) for name in averages)]


def _holding_power(module: nn.Module) -> list[Change]:
    """Return what holds the power iteration of a spectral norm, of either kind."""
    if isinstance(module, _SpectralNorm):
        return [(module, "training", False)]
    hooks = module._forward_pre_hooks.values()
    return [(hook, "n_power_iterations", 0) for hook in hooks if isinstance(hook, SpectralNorm)]


@contextmanager
def _held_others(model: nn.Module, hold: Hold | None) -> Iterator[None]:
    """Hold what keeps statistics that cannot be averaged: spectral norms, and what only the user knows."""
    resting = [change for module in model.modules() if _is_known(module) for change in _holding_power(module)]
    with _changed(resting), nullcontext() if hold is None else hold(model):
        yield


@contextmanager
def _changed(changes: Sequence[Change]) -> Iterator[None]:
    """Set attributes for a while, and put back what was found."""
    found = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in found:
            setattr(owner, name, value)
