# The commands of the house. `make help` lists them; each makes .venv first where it needs to.

PYTHON ?= python3
VENV := .venv
LOCK := requirements.lock
STAMP := $(VENV)/.complete
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# A stamp without a working interpreter beside it is no environment: forget it.
$(shell $(BIN)/python -c 'import pip' >/dev/null 2>&1 || rm -f $(STAMP))

.DEFAULT_GOAL := help
.PHONY: help .venv plan plan-tpu test test-slow sglang test-sglang lint format demo notebooks lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv: $(STAMP) ## install the locked default and dev dependencies, editable

# The stamp is written last. Without it whatever lies in .venv is half made and is thrown away;
# with an old one the environment is brought up to the lock in place.
$(STAMP): pyproject.toml $(LOCK)
	@test -f $(STAMP) || { echo '$(PYTHON) -m venv --clear $(VENV)'; $(PYTHON) -m venv --clear $(VENV); }
	@rm -f $(STAMP)
	@echo 'installing the versions of $(LOCK) into $(VENV) (about a minute)'
	$(PIP) install --quiet --progress-bar off --no-compile --requirement $(LOCK)
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

# In a directory of its own: what lies in an environment every process of jax would load.
plan: $(VENV)/plan/.complete ## the CUDA compiler, to compile for GPUs that are not here (0.5 GB)

$(VENV)/plan/.complete: requirements-plan.lock $(STAMP)
	rm -rf $(VENV)/plan
	$(PIP) install --quiet --progress-bar off --no-deps --no-compile --target $(VENV)/plan --requirement $<
	@touch $@

plan-tpu: $(VENV)/plan-tpu/.complete ## the TPU compiler, likewise (0.7 GB)

$(VENV)/plan-tpu/.complete: requirements-plan-tpu.lock $(STAMP)
	rm -rf $(VENV)/plan-tpu
	$(PIP) install --quiet --progress-bar off --no-deps --no-compile --target $(VENV)/plan-tpu --requirement $<
	@touch $@

test: $(STAMP) ## the default suite (CPU, minutes)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup

test-slow: $(STAMP) ## the tests too long for the default suite
	XLA_FLAGS= $(BIN)/python -m pytest -m 'slow and not gpu and not real_sglang'

sglang: $(STAMP) ## a real SGLang for the CPU in .sglang (3 GB, minutes; see docs/sglang.md)
	$(BIN)/python -m tools.sglang.install $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))

test-sglang: $(STAMP) ## the protocol's suite against a real SGLang (make sglang first)
	$(BIN)/python -m pytest -m real_sglang tests/real_sglang

lint: $(STAMP) ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(STAMP) ## warm-up and asynchronous RL of a small model on this machine
	rm -rf runs/demo_sft runs/demo
	$(BIN)/python -m experiments.sft_run --gin experiments/configs/runs/demo_sft.gin --out runs/demo_sft
	$(BIN)/python -m experiments.rl_run --gin experiments/configs/runs/demo.gin --out runs/demo
	@echo 'results: runs/demo/summary.json, runs/demo/curves.png, runs/demo/metrics/'

notebooks: $(STAMP) ## run the notebooks at full size (about 40 minutes); HTML in build/notebooks
	$(BIN)/python -m tools.notebooks --out build/notebooks $(sort $(wildcard notebooks/*.ipynb))

# Needs no .venv: it resolves pyproject.toml anew, in an environment of its own.
lock: ## resolve the dependencies anew and write the lock
	$(PYTHON) -m venv --clear build/lock
	build/lock/bin/python -m pip --disable-pip-version-check install --quiet --dry-run \
	  --ignore-installed --report build/lock/report.json '.[dev]'
	$(PYTHON) tools/lock.py build/lock/report.json > build/lock/requirements.lock
	mv build/lock/requirements.lock $(LOCK)
	rm -rf build/lock

clean: ## remove .venv, caches and builds (runs/ stays)
	rm -rf $(VENV) build dist .pytest_cache .hypothesis .ruff_cache .mypy_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
