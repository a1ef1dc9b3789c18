"""Peak memory of a program, counted from the allocator's own events."""

import gc
import os
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_memory"]


def peak_memory(program: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """Peak bytes that torch holds at once for what `program` allocates.

    Args:
        program: allocates on `device` everything that shall count; for a training step that is the model, the
            optimizer and the batch too. What was allocated before it is left out.
        device: "cpu", where every allocation and release is summed, or a CUDA device, whose allocator knows.

    Returns:
        Bytes. On the CPU the figure is exact and repeats; blocks that the allocator rounds up count as asked
        for.
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        program()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - start

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's chatter on stderr
    collecting = gc.isenabled()
    gc.disable()  # when a cycle is collected must not depend on what ran before
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            program()
    finally:
        if collecting:
            gc.enable()
    assert recorded.profiler is not None
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
