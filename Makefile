# Every target sets up its own virtual environment first; nothing needs to be installed by hand.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
READY   = $(VENV)/.ready
# Many tests wait for processes of their own: twice as many workers as the smallest machine has cores.
SIDE_BY_SIDE = -n 3 --dist worksteal

.PHONY: quickstart test test-all fuzz chaos lint bench docs clean

quickstart: $(READY)
	$(BIN)/spiralformer search quickstart

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --durations=15

test-all: $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[tracking,finetune]"
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m ""

fuzz: $(READY)
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest tests/test_fuzz.py tests/test_fuzz_borders.py --timeout=3600

chaos: $(READY)
	CHAOS_RUNS=10 $(BIN)/python -m pytest -m "" tests/studies/test_chaos.py --timeout=900

lint: $(READY)
	$(BIN)/ruff check . --fix
	$(BIN)/ruff format .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/pricing.py
	$(BIN)/python -W ignore benchmarks/speed.py --out benchmarks/results/speed_cpu.json

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(READY)

clean:
	rm -rf $(VENV) build site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
