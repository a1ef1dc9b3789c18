"""Arithmetic on lists of tensors: the only file that sees ``torch._foreach_*`` and how tensors are cut over ranks.

A ``Vec`` is one vector of the whole parameter space, kept as the list of its tensors: of any floating-point types, on
any devices, plain or cut over ranks (``DTensor``). What is done entry by entry is done on the shards that the rank
holds; norms and products are those of the whole tensors, the same on all ranks, and at least float32. Functions whose
name ends in an underscore overwrite their first argument.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Generator, Tensor

Vec: TypeAlias = list[Tensor]
Ranks: TypeAlias = tuple[Any, tuple[int, ...]]
"""A device mesh and those of its dimensions along which a tensor is cut."""


def norm(u: Sequence[Tensor], p: float = 2.0) -> Tensor:
    """Return ``‖u‖_p`` over all entries of all tensors, as a tensor of no dimensions."""
    if not u:
        return torch.zeros(())
    here = local(u)
    if p == math.inf:
        here = [t if t.numel() else t.new_zeros(1) for t in here]
    widest = max(map(_wide, here), key=lambda dtype: dtype.itemsize) if _is_low(here) else None
    parts = torch._foreach_norm(here, p, widest)
    whole: Tensor = torch.linalg.vector_norm(_everywhere(parts, u), p)
    return whole


def dot(u: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:
    """Return ``uᵀv`` over all entries, as a tensor of no dimensions."""
    if not u:
        return torch.zeros(())
    return total([torch.dot(_flat(a), _flat(b)) for a, b in zip(local(u), local(v, u), strict=True)], u)


def total(parts: Sequence[Tensor], u: Sequence[Tensor]) -> Tensor:
    """Return the sum of ``parts``, one of each tensor of ``u`` and all of one shape, over tensors and ranks."""
    return _everywhere(parts, u).sum(0)


def over(numerator: float, denominator: Tensor, beside: Tensor | None = None) -> Tensor | float:
    """Return ``numerator / denominator``; 0 where that is too small to divide by: what vanishes has no direction.

    ``beside`` is the size of what the denominator is a difference of, and ten times its precision is too small too.
    """
    limits = torch.finfo(denominator.dtype)
    if denominator.device.type != "cpu":
        least = limits.tiny if beside is None else (10 * limits.eps * beside).clamp(min=limits.tiny)
        return torch.where(denominator <= least, 0.0, numerator / denominator)
    number, least = float(denominator), limits.tiny if beside is None else 10 * limits.eps * float(beside)
    return 0.0 if number <= max(least, limits.tiny) else numerator / number


def clone(u: Sequence[Tensor]) -> Vec:
    """Return a copy that shares no memory with ``u``."""
    copies = [torch.empty_like(t) for t in u]
    copy_(copies, u)
    return copies


def copy_(u: Sequence[Tensor], v: Sequence[Tensor]) -> None:
    """Overwrite ``u`` by ``v``, to the bit."""
    if u:
        torch._foreach_copy_(local(u), local(v, u))


def scale_(u: Sequence[Tensor], c: Tensor | float) -> None:
    """Overwrite ``u`` by ``c·u``."""
    if not u:
        return
    here = local(u)
    if _is_low(here) or (isinstance(c, Tensor) and {c.device} != {t.device for t in here}):
        torch._foreach_mul_(here, _beside(c, here))
    else:
        torch._foreach_mul_(here, c if isinstance(c, Tensor) else torch.tensor(c, dtype=torch.float64))


def add_(u: Sequence[Tensor], v: Sequence[Tensor], c: Tensor | float = 1.0) -> None:
    """Overwrite ``u`` by ``u + c·v``, without a copy of ``v``."""
    if not u:
        return
    here, there = local(u), local(v, u)
    if _is_low(here) or (isinstance(c, Tensor) and c.device.type != "cpu"):
        torch._foreach_addcmul_(here, there, _beside(c, here))
    else:
        number, largest = float(c), torch.finfo(here[0].dtype).max
        torch._foreach_add_(here, there, alpha=number if abs(number) <= largest else math.copysign(math.inf, number))


def mul_(u: Sequence[Tensor], v: Sequence[Tensor]) -> None:
    """Overwrite ``u`` by the entry-wise product ``u ⊙ v``; the tensors of ``v`` are spread over those of ``u``."""
    if u:
        torch._foreach_mul_(local(u), local(v, u))


def lerp_(u: Sequence[Tensor], v: Sequence[Tensor], c: float) -> None:
    """Overwrite ``u`` by ``u + c·(v − u)``; ``c`` may lie outside [0, 1]."""
    if u:
        torch._foreach_lerp_(local(u), local(v, u), c)


def reject(u: Vec, v: Vec) -> Vec:
    """Return the part of ``u`` orthogonal to ``v``: ``u − (uᵀv̂) v̂``; ``u`` itself where ``v = 0``."""
    part = clone(u)
    add_(part, v, dot(u, v) * over(-1.0, dot(v, v)))
    return part


def filter_norms(u: Sequence[Tensor]) -> Vec:
    """Return ``‖w_k‖`` of the filters that this rank holds any of, to be spread over its entries of them.

    A filter is a slice along dimension 0 of the whole tensor, or all of a tensor of one dimension.
    """
    sizes = []
    cut: dict[Ranks, list[int]] = {}
    for i, (t, here) in enumerate(zip(u, local(u), strict=True)):
        inner = range(min(1, t.ndim - 1), t.ndim)
        sizes.append(torch.linalg.vector_norm(here, dim=tuple(inner), keepdim=True, dtype=_wide(here)))
        cut.setdefault(_ranks(t, inner), []).append(i)
    for ranks, indices in cut.items():
        if ranks[1]:
            flat = torch.cat([sizes[i].reshape(-1) for i in indices])
            whole = torch.linalg.vector_norm(_gathered(flat[None], ranks), dim=0)
            pieces = torch.split(whole, [sizes[i].numel() for i in indices])
            for i, piece in zip(indices, pieces, strict=True):
                sizes[i] = piece.view_as(sizes[i]).to(sizes[i])
    return sizes


def randn(like: Tensor, generator: Generator) -> Tensor:
    """Return standard normal noise, drawn for all entries of a tensor; of a shard, its own part of that."""
    return _shard(torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator), like)


def join(u: Sequence[Tensor]) -> Tensor:
    """Return all entries of the whole tensors one after the other, on the device of the first."""
    whole = [t.full_tensor() if _is_sharded([t]) else t for t in u]  # type: ignore[attr-defined]
    return torch.cat([t.reshape(-1).to(u[0].device) for t in whole])


def split(flat: Tensor, like: Sequence[Tensor]) -> Vec:
    """Return what ``join`` would have made ``flat`` of: tensors shaped and cut over ranks as ``like``."""
    pieces = torch.split(flat, [t.numel() for t in like])
    return [_shard(piece.view(t.shape).to(t.device), t) for piece, t in zip(pieces, like, strict=True)]


def local(u: Sequence[Tensor], like: Sequence[Tensor] | None = None) -> Vec:
    """Return the entries of each tensor that this rank holds, to be read or overwritten.

    Args:
        u: plain tensors, which are returned as they are, and tensors cut over ranks.
        like: tensors as which those of ``u`` shall be cut; a copy is made where they are not.
    """
    if not _is_sharded(u):
        return list(u)
    from torch.distributed.tensor import DTensor, Replicate

    here = []
    with torch.no_grad():
        for i, t in enumerate(u):
            if isinstance(t, DTensor):
                wanted = getattr(like[i], "placements", t.placements) if like is not None else t.placements
                wanted = tuple(Replicate() if place.is_partial() else place for place in wanted)
                t = (t if t.placements == wanted else t.redistribute(placements=wanted)).to_local()
            here.append(t)
    return here


def _is_sharded(u: Sequence[Tensor]) -> bool:
    """Whether any of the tensors is cut over ranks; there is none before that module has been imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and module.DTensor in map(type, u)


def _is_low(u: Vec) -> bool:
    """Whether any of the tensors has fewer than 32 bits an entry."""
    return min(map(Tensor.element_size, u)) < 4


def _wide(t: Tensor) -> torch.dtype:
    """Return the type in which sums over ``t`` neither overflow nor lose digits: at least float32."""
    return torch.promote_types(t.dtype, torch.float32)


def _flat(t: Tensor) -> Tensor:
    return t.reshape(-1) if t.element_size() >= 4 else t.reshape(-1).float()


def _beside(c: Tensor | float, u: Vec) -> Vec:
    """Return ``c`` beside each tensor, on its device, as a tensor that is spread over its entries.

    A mere number would be rounded to fp16 or bf16, and maybe overflow, before it is multiplied with such a tensor.
    """
    wide = c if isinstance(c, Tensor) else torch.tensor(c, dtype=torch.float32)
    copies = {device: wide.to(device) for device in {t.device for t in u}}
    return [copies[t.device].reshape([1] * t.ndim) for t in u]


def _everywhere(parts: Sequence[Tensor], u: Sequence[Tensor]) -> Tensor:
    """Return ``parts``, one of each tensor of ``u`` as this rank has it, stacked with those of all other shards."""
    kinds = {(part.device, part.dtype) for part in parts}
    if len(kinds) > 1:
        home, widest = parts[0].device, max((dtype for _, dtype in kinds), key=lambda dtype: dtype.itemsize)
        parts = [part.to(home, widest) for part in parts]
    if not _is_sharded(u):
        return torch.stack(list(parts))
    groups: dict[Ranks, Vec] = {}
    for part, t in zip(parts, u, strict=True):
        groups.setdefault(_ranks(t, range(t.ndim)), []).append(part)
    return torch.cat([_gathered(torch.stack(same), ranks).to(parts[0].device) for ranks, same in groups.items()])


def _ranks(t: Tensor, dims: range) -> Ranks:
    """Return over which ranks the dimensions ``dims`` of a tensor are cut."""
    if not _is_sharded([t]):
        return None, ()
    places: Any = enumerate(t.placements)  # type: ignore[attr-defined]
    return t.device_mesh, tuple(i for i, place in places if getattr(place, "dim", None) in dims)  # type: ignore[attr-defined]


def _gathered(part: Tensor, ranks: Ranks) -> Tensor:
    """Return the ``part`` of all ranks, one after the other along dimension 0: one small message a mesh dimension."""
    mesh, dims = ranks
    for dim in dims:
        part = part.to(mesh.device_type)
        parts = [torch.empty_like(part) for _ in range(mesh.size(dim))]
        torch.distributed.all_gather(parts, part, group=mesh.get_group(dim))
        part = torch.cat(parts)
    return part


def _shard(whole: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of ``whole``, cut as ``like`` is; every rank has the same ``whole``."""
    if not _is_sharded([like]):
        return whole
    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    places: Any = enumerate(like.placements)  # type: ignore[attr-defined]
    part = whole
    for i, place in sorted(places, key=lambda each: hasattr(each[1], "split_factor")):
        dim = getattr(place, "dim", None)  # a place with a split factor cuts what the others have left
        if dim is not None:
            length = -(-part.shape[dim] // mesh.size(i))  # torch.chunk's: the last ranks may have less, or nothing
            start = min(length * mesh.get_coordinate()[i], part.shape[dim])
            part = part.narrow(dim, start, min(length, part.shape[dim] - start))
    mine = torch.empty_like(like, dtype=whole.dtype)
    local([mine])[0].copy_(part)
    return mine
