"""The heap of the C library, which gives memory back too early."""

from __future__ import annotations

from functools import cache

import torch

BLOCK = 31 << 20
"""Bytes, just under the 32 MiB up to which glibc learns from a block's size (mallopt(3), M_MMAP_THRESHOLD)."""


@cache
def widen() -> None:
    """Let glibc keep some 60 MiB of freed memory for the next product.

    Otherwise it returns what a product has freed to the system, which hands it out again page by page, zeroed: a tenth
    of a small network's product on the CPU. glibc keeps up to twice the largest mapped block that it has seen freed, so
    one is taken and freed, once a process, without a page of it being touched. Other allocators are left as they are.
    """
    torch.empty(BLOCK, dtype=torch.uint8)
