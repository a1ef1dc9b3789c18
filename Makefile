.PHONY: setup demo test lint bench clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# backpack asks for torchvision, which curvlinops does not use and which does not import beside CPU builds of torch
WITHOUT_TORCHVISION := curvlinops-for-pytorch backpack-for-pytorch

demo: setup  ## compare the methods on the digits
	$(BIN)/steppe compare --out runs/demo

test: lint  ## everything that CI holds
	$(BIN)/python -m pytest -n logical --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup  ## cost of a step beside the peers, on ranks, in memory, of curvature and second order; wants a quiet machine
	$(BIN)/pip install -q -c constraints.txt -e '.[bench,peers]'
	$(BIN)/pip install -q -c constraints.txt --no-deps $(WITHOUT_TORCHVISION)
	$(BIN)/python benchmarks/step_cost.py
	$(BIN)/python benchmarks/ranks.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/curvature.py
	$(BIN)/python benchmarks/second_order.py
	$(BIN)/python benchmarks/steps_to_loss.py --cases digits --seeds 5
	$(BIN)/python benchmarks/steps_to_loss.py --cases cifar10 --bases sgd adamw adahessian kfac

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[lab]'
	touch $@

$(VENV)/.dev: $(VENV)/.ready  ## tests want the trainers too, which a comparison does not
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[lab,dev,peers]'
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt --no-deps $(WITHOUT_TORCHVISION)
	touch $@

clean:
	rm -rf $(VENV) runs
