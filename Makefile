.PHONY: setup demo test lint bench clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

demo: setup  ## compare the methods on the digits
	$(BIN)/steppe compare --out runs/demo

test: lint  ## everything that CI holds
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup  ## cost of a step beside the peers, on ranks, and in memory; needs a quiet machine
	$(BIN)/pip install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/step_cost.py
	$(BIN)/python benchmarks/ranks.py
	$(BIN)/python benchmarks/memory.py

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[lab]'
	touch $@

$(VENV)/.dev: $(VENV)/.ready  ## tests want the trainers too, which a comparison does not
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[lab,dev]'
	touch $@

clean:
	rm -rf $(VENV) runs
