# `make demo` and `make test` need only Python >= 3.11; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint bench bench-solvers clean
.DEFAULT_GOAL := demo

.venv/.base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("undiffuse needs Python >= 3.11, this is %d.%d: give another with make PYTHON=..." % v[:2])'
	$(PYTHON) -m venv .venv
	@echo "Installing into .venv (torch is the large part) ..."
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e .
	@touch $@

.venv/.dev: .venv/.base
	$(PIP) -c constraints.txt -e '.[dev]'
	$(PIP) -c constraints.txt --no-deps k-diffusion
	@touch $@

demo: .venv/.base
	$(BIN)/undiffuse demo

test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/.peers: .venv/.dev
	$(PIP) -c constraints.txt tqdm einops
	$(PIP) -c constraints.txt --no-deps azula smalldiffusion
	@touch $@

bench: .venv/.peers
	for b in ddpm_chain overhead import_time solvers/defects; do $(BIN)/python benchmarks/$$b.py || exit 1; done

bench-solvers: .venv/.peers
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/solvers/run.py

clean:
	rm -rf .venv runs
