# The commands of the project. `make` alone lists them. Each is one line that a person could type.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
EXTRAS := torch,jax,hf,parity,parquet,dev
PEER_PLATFORMS := _2_28 _2_27 _2_24 _2_17 2014 1
WORKERS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)

# No folder of this checkout may shadow an installed package (kernels/ is also a published package's name).
export PYTHONSAFEPATH := 1
# Two processes on two cores beat two processes with many threads each.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup check test test-fast parity parity-full mutants bench gpu peers docs format clean

help: ## list the commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(READY) ## make .venv and install everything into it (at once when nothing changed)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"python = {sys.version.split()[0]}: expected 3.11 or newer, because the sources use its syntax; try make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[$(EXTRAS)]'
	@command -v cargo >/dev/null || echo 'note: no Rust here (cargo not found): nothing that exists today needs it; the gateway will'
	@command -v nvidia-smi >/dev/null || echo 'note: no NVIDIA GPU here: everything runs on the CPU; make gpu is for a machine that has one'
	@touch $@

check: $(READY) ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: $(READY) ## the whole test suite on the CPU
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-fast: $(READY) ## the tests without the slow ones
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not slow and not browser'

parity: $(READY) ## the main job: both halves against each other and against float64, quick lane
	$(BIN)/parity run --quick

parity-full: $(READY) ## the same with every case, every mutant and Hugging Face as witness
	$(BIN)/parity run --full --against hf

mutants: $(READY) ## every planted bug, one row each
	$(BIN)/parity mutants

bench: $(READY) ## measurements that run on a CPU; the kernels' benchmarks as a dry run
	$(BIN)/python benchmarks/bench_false_alarms.py --runs 20
	$(BIN)/python benchmarks/kernels/run_all.py --dry

gpu: $(READY) ## on an NVIDIA GPU: parity's questions, kernels fuzzed, kernels beside their peers; dated reports
	$(BIN)/python benchmarks/gpu_lane.py
	$(BIN)/parity run kernels --device cuda --only-half torch
	$(BIN)/python benchmarks/kernels/run_all.py

peers: $(READY) ## the kernels' peers as wheels for a GPU machine with Python 3.12, into .whl/ (benchmarks/kernels/README.md)
	$(BIN)/uv run --quiet --no-project --with pip python -m pip download --quiet --disable-pip-version-check --no-deps \
	  --only-binary=:all: --python-version 3.12 --implementation cp $(PEER_PLATFORMS:%=--platform manylinux%_x86_64) \
	  -d .whl -r benchmarks/kernels/peers.txt

docs: $(READY) ## run every code block of README and docs
	$(BIN)/python -m pytest tests/house/test_docs.py

format: $(READY) ## let ruff rewrite what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove what the commands made
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis parity-runs runs dist
