"""The heap of the C library, which gives memory back too early."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
KEPT = 1 << 30
"""Bytes of freed memory that may stay with the process."""
BLOCK = 32 << 20
"""Bytes up to which a block is taken from the heap: the most that glibc allows."""


@cache
def widen() -> None:
    """Let glibc keep up to 1 GiB of freed memory for the next product or step, once a process.

    Otherwise it returns what was freed to the system, which hands it out again page by page, zeroed: up to a sixth of a
    product on the CPU, and less of a training step. What is in use at the peak is what it was; the process may hold
    more. Whoever has set a threshold in the environment
    (``MALLOC_TRIM_THRESHOLD_``, ``GLIBC_TUNABLES``) keeps it, and other C libraries are left as they are.
    """
    if {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & set(os.environ):
        return
    if "threshold" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, BLOCK)
        mallopt(_TRIM_THRESHOLD, KEPT)
