"""Sharded parameters (FSDP2): the numbers are those of the whole parameters, the memory that of the shard."""

from __future__ import annotations

import pytest
from launch import launch

import fsdp_work as work

RECIPES = [
    "sam()",
    "sam(p=3)",
    "sam(steps=2)",
    "asam()",
    "gsam()",
    "esam()",
    "esam_sds()",
    "rwp()",
    "rwp(alpha=0)",
    "looksam(k=2)",
    "rst(sam())",
    "mixed_sam()",
    "ssam(refresh=2)",
    "ssam_dynamic(refresh=2)",
]
PLAIN = {
    f"{text} {net} {base}": (net, text, base, {})
    for text in RECIPES
    for net, base in [("odd", "adamw"), ("attention", "sgd")]
}
ACCUMULATED = {
    f"{text} accumulated": ("attention", text, "sgd", {"accumulate": True})
    for text in ["sam()", "gsam()", "esam()", "esam_sds()", "rwp()"]
}
HYBRID = {
    f"{text} {mesh}": ("odd", text, "sgd", {"mesh": mesh})
    for text in ["sam()", "rwp()", "ssam_dynamic(refresh=2)"]
    for mesh in [(1, 2), (2, 1)]
}
CLIPPED = {"sam() clipped": ("odd", "sam()", "sgd", {"clip": 0.1})}
CASES = {**PLAIN, **ACCUMULATED, **HYBRID, **CLIPPED}


@pytest.fixture(scope="module")
def differences():
    return launch(2, work.differences, CASES, seconds=240)[0]


@pytest.mark.parametrize("case", CASES)
def test_sharded_steps_equal_those_of_the_whole_batch(differences, case):
    assert not isinstance(differences[case], str), differences[case]
    assert differences[case] < 1e-9
