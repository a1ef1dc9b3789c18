"""Memory that a product or a step has freed is there for the next one."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from steppe.curvature.analyzer import Analyzer

net = torch.nn.Linear(4, 2)
if "measured" in sys.argv:
    data = [(torch.randn(8, 4), torch.zeros(8, dtype=torch.int64))]
    Analyzer(net, lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1], reduction="none"), data).trace()
if "trained" in sys.argv:
    from steppe.lab.config import Config
    from steppe.lab.train import Training

    Training(Config(train_size=100))

def product():
    blocks = [torch.ones(1 << 20) for _ in range(40)]  # 4 MiB each

product()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
product()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*arguments: str, **settings: str) -> int:
    """Pages that the system had to hand out for the second of two products."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))} | settings
    program = [sys.executable, "-c", PROGRAM, *arguments]
    return int(subprocess.run(program, capture_output=True, text=True, check=True, env=environment).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is spoken to")
@pytest.mark.parametrize("work", ["measured", "trained"])
def test_freed_memory_is_kept_unless_the_environment_says_otherwise(work):
    assert faults(work) < faults() / 5
    assert faults(work, MALLOC_TRIM_THRESHOLD_="131072") > faults(work) * 5
