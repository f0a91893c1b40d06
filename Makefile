# Every target sets up .venv by itself on a fresh machine (Python 3.11 or later; a few minutes the first time).
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test lint slow gpu docs bench clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

demo: $(READY) ## run the demo: a small job folded and not folded, offline
	$(BIN)/radix-mlp demo

test: lint ## lint, types and the fast tests: what CI runs
	$(BIN)/python -m pytest

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: lint ## the slow tests too, among them the sweep over every model type
	$(BIN)/python -m pytest -m "not gpu"

gpu: ## the tests that need a CUDA device, in the current environment
	$(PYTHON) -m pytest -m gpu

docs: $(READY) ## write the generated documents
	$(BIN)/python docs/generate.py

bench: $(READY) ## the benchmarks that run here, small
	$(BIN)/radix-mlp bench --quick

clean: ## remove .venv and caches
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build src/*.egg-info

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("radix-mlp needs Python 3.11 or later: make PYTHON=python3.12 ...")'
	@echo "setting up .venv (a few minutes the first time)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
