"""The documents are true: what they list is what there is, and what they show runs."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

import steppe

ROOT = Path(__file__).parents[1]
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()]
METHODS = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^(?P<off><!-- not run -->\s*)?```python\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)


def snippets():
    """Every Python block that is not marked ``<!-- not run -->``, padded so that its line numbers are the page's."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in BLOCK.finditer(text):
            if not block["off"]:
                line = text.count("\n", 0, block.start("code"))
                yield pytest.param(page, "\n" * line + block["code"], id=f"{page.name}:{line + 1}")


@pytest.mark.parametrize(("page", "code"), list(snippets()))
def test_snippets_run(page, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        exec(compile(code, page, "exec", dont_inherit=True), {"__name__": "__main__"})


def test_the_example_of_a_new_method_is_run():
    assert any("@recipe" in param.values[1] for param in snippets())


def section(title):
    """The text under a heading, up to the next one."""
    return re.split(r"^#+ ", METHODS.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def rows(text):
    """The cells of a Markdown table's rows, without its header."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def signature(name):
    values = inspect.signature(getattr(steppe, name)).parameters.values()
    return f"`{name}({', '.join(str(value.replace(annotation=value.empty)) for value in values)})`"


TABLE = rows(section("The methods"))


def test_every_recipe_is_listed_with_its_signature():
    assert sorted(row[0] for row in TABLE) == sorted(signature(name) for name in steppe.recipes.__all__)


@pytest.mark.parametrize(("recipe", "cost"), [(row[0], row[2]) for row in TABLE if "schedule" not in row[2]])
def test_costs_are_those_at_the_defaults(recipe, cost):
    name = recipe.strip("`").split("(")[0]
    given = {"rst": "sam()", "grst": "sam()", "m_sharpness": "sam(), 32"}.get(name, "")
    assert float(cost.rsplit("= ", 1)[1]) == round(steppe.parse(f"{name}({given})").cost(), 2)


@pytest.mark.parametrize("text", re.findall(r"`(\w+\(.*\))`", section("What composes").replace("`, `", "`\n`")))
def test_what_composes(text):
    assert isinstance(steppe.parse(text), steppe.Method)


@pytest.mark.parametrize(("text", "message"), [(row[0].strip("`"), row[1]) for row in rows(section("What is refused"))])
def test_what_is_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        steppe.parse(text)
    assert str(error.value).splitlines()[0] == message
