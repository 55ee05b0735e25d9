# finetune: `make help` lists what there is. Everything runs in .venv, which the targets make themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist worksteal
UNIT := tests/unit tests/architecture
# make demo ENGINE=torch installs PyTorch and runs on it; ENGINE=mlx runs on MLX; auto takes the better one installed.
ENGINE ?= auto
BACKEND = $(patsubst torch,pytorch,$(ENGINE))
# One thread for each of several processes: spinning threads would fight for the cores.
ONE_THREAD := OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1
# What the unit tests alone have to cover. The rest is tested with engines and as whole commands, which measuring would
# slow down by half.
GATED := src/finetune/core/*,src/finetune/config/*,src/finetune/data/*,src/finetune/adapters/*,src/finetune/training/*

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-unit test-lora-quick test-lora lint format demo-model bench build clean

##@ Start here
help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n\033[1m%s\033[0m\n", substr($$0, 5)} \
	  /^[a-z-]+:.*## / {printf "  \033[36mmake %-16s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST); echo

demo: $(VENV)/$(if $(filter pytorch,$(BACKEND)),.torch,.base) ## Tune the carried model on the carried data (ENGINE=torch: on PyTorch)
	$(BIN)/ft demo --backend $(BACKEND)

test: $(VENV)/.dev ## Run the whole test suite on both engines, and hold the unit tests' coverage against the bar
	$(ONE_THREAD) $(PYTEST) $(PARALLEL) $(UNIT) --cov --cov-report=
	$(BIN)/coverage report --include='$(GATED)' --skip-covered --fail-under=90
	$(ONE_THREAD) $(PYTEST) $(PARALLEL) $(UNIT:%=--ignore=%)

setup: $(VENV)/.dev ## Make .venv with everything that development and the tests need

##@ Checks
test-unit: $(VENV)/.dev ## Only what needs neither engine nor subprocess
	$(PYTEST) $(UNIT)

test-lora-quick: $(VENV)/.dev ## LoRA in a few seconds: shapes, zero start, gradient, falling loss
	$(PYTEST) -m lora_quick -q tests/contract

test-lora: $(VENV)/.dev ## Everything about LoRA: finite differences, PEFT parity, merging
	$(PYTEST) -m "lora or lora_quick"

lint: $(VENV)/.dev ## Style, types and import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev ## Bring the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

##@ Making things
demo-model: $(VENV)/.base ## Train the carried demo model again, from random weights
	$(BIN)/python scripts/train_demo_model.py

bench: $(VENV)/.bench ## Time this project against TRL + PEFT and mlx-lm, in turn (long; see docs/performance.md)
	$(BIN)/python -m benchmarks

build: $(VENV)/.dev ## Build the wheel and the source archive into dist/
	$(BIN)/python -m build

clean: ## Remove .venv and everything that was built
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .coverage*

# .base is enough to use the project on MLX, .torch adds the PyTorch engine, .dev the tools and references of the
# tests, .bench the peers that the benchmarks measure.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "finetune needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V). Use: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check --upgrade 'pip>=25.1'
	@touch $@

$(VENV)/.base: $(VENV)/.python pyproject.toml
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	@touch $@

# The exact version comes first. Where the package index offers a CPU build of it (a mirror, or an extra index in
# pip's configuration), pip takes that one; from PyPI itself, Linux on x86-64 gets the build with CUDA: some gigabytes.
# To avoid them: pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu, then make again.
$(VENV)/.torch: $(VENV)/.base
	$(BIN)/python -m pip install -q --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[torch]'
	@touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(BIN)/python -m pip install -q --disable-pip-version-check --group bench
	@touch $@

$(VENV)/.dev: $(VENV)/.torch
	$(BIN)/python -m pip install -q --disable-pip-version-check --group dev -e '.[serve]'
	@touch $@
