"""The documents are true: what they list is what there is, and what they show runs."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import steppe

ROOT = Path(__file__).parents[1]
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()]
METHODS = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
LOOPS = ROOT / "docs" / "training-loops.md"
# without the interpreter's end, in which gloo's threads abort if they still have a tensor to free (pytorch#190489)
LEAVE = "\nimport os\nos._exit(0)\n"
BLOCK = re.compile(r"^(<!-- (?P<how>[\w ]+) -->\s*)?```python\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)


def snippets(several_ranks=False):
    """Every Python block of one process or of two, padded so that its line numbers are the page's.

    One marked ``<!-- before the others -->`` stands before each that follows on its page; ``<!-- two ranks -->`` is for
    two ranks, and ``<!-- not run -->`` for nobody.
    """
    for page in PAGES:
        text, before = page.read_text(encoding="utf-8"), ""
        for block in BLOCK.finditer(text):
            line = text.count("\n", 0, block.start("code"))
            code = before + "\n" * (line - before.count("\n")) + block["code"]
            if block["how"] == "before the others":
                before = code
            if block["how"] != "not run" and (block["how"] == "two ranks") == several_ranks:
                yield pytest.param(page, code, id=f"{page.name}:{line + 1}")


@pytest.mark.parametrize(("page", "code"), list(snippets()))
def test_snippets_run(page, code, tmp_path, monkeypatch):
    """What they compile runs in eager: ``test_compile`` has the rest."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(), torch.compiler.set_stance("force_eager"):
        torch.manual_seed(0)
        exec(compile(code, page, "exec", dont_inherit=True), {"__name__": "__main__"})


@pytest.mark.parametrize(("page", "code"), list(snippets(several_ranks=True)))
def test_snippets_run_on_two_ranks(page, code, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import torch\ntorch.manual_seed(0)\n" + code + LEAVE, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    ended = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr


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


def test_every_trap_has_its_test():
    """The tests that the page names are there, and all traps that have one are named."""
    tests = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    traps = LOOPS.read_text(encoding="utf-8").split("## The traps\n", 1)[1]
    named = [re.findall(r"`(test_\w+)`", row[2]) for row in rows(traps)]
    assert [int(row[0].split(".")[0]) for row in rows(traps)] == list(range(1, len(named) + 1))
    assert all(named)
    assert {name for each in named for name in each} <= tests
    assert {name for name in tests if name.startswith("test_trap_")} <= {name for each in named for name in each}
