"""The rooms of the house: who may import whom."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

import steppe

ROOT = Path(steppe.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
ROOF = {"lab", "cli", "curvature", "optim", "integrations"}
MAY = {
    "vec": set(),
    "checks": set(),
    "rng": set(),
    "caches": set(),
    "once": set(),
    "twice": {"twice"},
    "norms": set(),
    "examples": set(),
    "ranks": set(),
    "groups": set(),
    "update": {"checks"},
    "wrapper": {"vec"},
    "others": {"vec"},
    "rounding": {"vec"},
    "point": {"rng", "vec"},
    "checkpoint": {"point"},
    "batch": {"vec", "caches", "norms", "rng", "examples", "ranks", "rounding"},
    "products": {"batch", "once", "rng", "twice", "vec"},
    "closure": {"vec", "caches", "norms", "ranks", "rng"},
    "method": {"point", "checks"},
    "stats": {"method"},
    "split": {"method"},
    "second_order": {"batch", "checks", "method", "rng", "vec", "wrapper"},
    "parts": {"point", "vec", "checks", "parts"},
    "recipes": {"method", "parts", "point", "checks", "recipes"},
    "text": {"recipes", "method"},
    "passes": {
        "wrapper",
        "groups",
        "products",
        "rounding",
        "split",
        "vec",
        "batch",
        "closure",
        "method",
        "others",
        "point",
        "second_order",
        "stats",
    },
    "step": {"passes", "second_order", "ranks", "wrapper", "update", "checkpoint", "split", "checks", "rounding"}
    | {"batch", "closure", "groups", "method", "others", "point", "stats", "vec"},
}


def rooms_of_the_page(heading: str) -> str:
    """What docs/design.md says of the rooms, from a heading on."""
    page = (Path(__file__).parents[1] / "docs" / "design.md").read_text()
    return page.split(heading)[1].split("\n## ")[0].split("All these are the core")[0].split("tests/ ")[0]


def room(file: Path) -> str:
    """The first name below ``steppe``: a folder or a file."""
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(file: Path) -> set[str]:
    """Absolute dotted names of all that a file imports, names included."""
    package = ["steppe", *file.relative_to(ROOT).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*up, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def rooms_used(file: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(file) if name.startswith("steppe.")}


CORE = [file for file in FILES if room(file) not in ROOF]
ids = {"ids": lambda file: str(file.relative_to(ROOT))}


@pytest.mark.parametrize("file", [f for f in CORE if room(f) in MAY], **ids)
def test_core_files_use_only_the_rooms_below(file):
    assert rooms_used(file) <= MAY[room(file)]


def test_every_room_of_the_core_has_its_rule():
    assert {room(f) for f in CORE} - {"__init__"} == set(MAY)


def test_the_page_has_the_same_rules():
    told = {}
    for row in re.findall(r"^\| (`.*) \| (.*) \|$", rooms_of_the_page("Imports go one way"), re.MULTILINE):
        rooms, allowed = (set(re.findall("`(.*?)`", cell)) for cell in row)
        told |= {name: allowed | ({name} if "each other" in row[1] else set()) for name in rooms}
    assert told == MAY


def test_the_page_has_every_file_in_its_place():
    place, shown = "", set()
    for line in re.findall(r"^  .*", rooms_of_the_page("## Rooms"), re.MULTILINE):
        if line[2] != " ":
            first = line.split()[0]
            place = first if first.endswith("/") else ""
        shown |= {place + name for name in re.findall(r"\b\w+\.py\b", line)}
    there = {str(file.relative_to(ROOT)) for file in FILES if "models" not in file.parts}
    assert shown - {"lab/init.py"} == {name for name in there if "/__init__" not in name}


@pytest.mark.parametrize("file", CORE, **ids)
def test_core_never_looks_up(file):
    assert not rooms_used(file) & (ROOF - ({"curvature", "optim"} if room(file) == "__init__" else set()))


@pytest.mark.parametrize("file", [f for f in FILES if room(f) == "curvature"], **ids)
def test_curvature_uses_only_the_core(file):
    assert not rooms_used(file) & (ROOF - {"curvature"})


@pytest.mark.parametrize("file", [f for f in FILES if room(f) == "optim"], **ids)
def test_optim_uses_only_the_core_and_curvature(file):
    assert not rooms_used(file) & (ROOF - {"curvature", "optim"})


@pytest.mark.parametrize("file", CORE, **ids)
def test_core_needs_only_torch_and_numpy(file):
    outside = {name.split(".")[0] for name in imports(file)} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "numpy", "steppe"}


@pytest.mark.parametrize("file", [f for f in FILES if room(f) == "parts"], **ids)
def test_parts_see_no_model_and_no_ranks(file):
    assert not [name for name in imports(file) if name.startswith(("torch.nn", "torch.distributed"))]


@pytest.mark.parametrize("file", [f for f in FILES if room(f) in ("lab", "cli")], **ids)
def test_lab_and_cli_use_the_public_library_only(file):
    public = {*steppe.__all__, "lab"}
    assert rooms_used(file) <= public | ({"cli"} if room(file) == "cli" else set())
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "steppe":
            assert node.attr in public, f"line {node.lineno}: steppe.{node.attr}"


@pytest.mark.parametrize("file", FILES, **ids)
def test_only_vec_sees_foreach(file):
    tree = ast.parse(file.read_text())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {name.split(".")[-1] for name in imports(file)}
    assert room(file) == "vec" or not [name for name in used if name.startswith("_foreach_")]


@pytest.mark.parametrize("file", FILES, **ids)
def test_files_stay_short(file):
    assert len(file.read_text().splitlines()) <= 300
