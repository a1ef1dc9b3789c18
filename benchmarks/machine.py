"""What a figure was measured on, and when: the line below every table."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

import torch


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())


def described() -> str:
    """The date, the processor and its cores, the CUDA devices, and the versions."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(
        [
            datetime.date.today().isoformat(),
            f"{cpu()}, {os.cpu_count()} cores",
            *devices,
            f"Python {platform.python_version()}, torch {torch.__version__}",
        ]
    )
