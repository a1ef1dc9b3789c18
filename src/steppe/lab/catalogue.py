"""The list of the methods, read from the recipes' own signatures and docstrings, and that of the bases."""

import inspect
import re

from rich.console import Group
from rich.padding import Padding
from rich.text import Text

import steppe
from steppe.lab.bases import BASES, write
from steppe.lab.presets import base_preset

__all__ = ["catalogue"]


def catalogue() -> Group:
    """Signature, first line, equation, cost and source of each recipe, and of each base, for the terminal."""
    methods = [part for name in steppe.recipes.__all__ for part in _entry(name)]
    return Group(
        *methods, Text("Bases, with their values on the digits:\n"), *(part for name in BASES for part in _base(name))
    )


def _base(name: str) -> list[Text | Padding]:
    base = BASES[name]
    values = {key: f"{value:g}" for key, value in base_preset("digits", name).items()}
    body = f"{base.update}\nCost: {base.cost}\nSource: {base.source}"
    return [Text(write(name, values), style="bold"), Padding(Text(body), (0, 0, 1, 4))]


def _entry(name: str) -> list[Text | Padding]:
    recipe = getattr(steppe.recipes, name)
    values = inspect.signature(recipe).parameters.values()
    signature = ", ".join(str(value.replace(annotation=value.empty)) for value in values)
    before, sections = _sections(inspect.getdoc(recipe) or "")
    body = [before, *(f"{title}: {sections[title]}" for title in ("Cost", "Source") if title in sections)]
    return [Text(f"{name}({signature})", style="bold"), Padding(Text("\n".join(body)), (0, 0, 1, 4))]


def _sections(docstring: str) -> tuple[str, dict[str, str]]:
    """First line and equation of a Google-style docstring, and its sections, each on one line."""
    before, *rest = re.split(r"^(Args|Returns|Raises|Cost|Source|Note|Example):", docstring, flags=re.MULTILINE)
    summary = "\n".join(before.strip().split("\n\n")[:2])
    return summary, {title: " ".join(text.split()) for title, text in zip(rest[::2], rest[1::2], strict=True)}
