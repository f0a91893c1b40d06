# Every target sets up .venv by itself on a fresh machine (Python 3.11 or later): a minute or two for the demo, a few for the tests.
PYTHON ?= python3
BIN := .venv/bin
# the library alone, and with what the tests need
DEMO := .venv/.demo
READY := .venv/.ready
SITE := .venv/.site

.DEFAULT_GOAL := help
.PHONY: help demo test lint slow gpu docs site bench clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

demo: $(DEMO) ## run the demo: a small job folded and not folded, offline
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

site: $(SITE) ## build the documentation site into site/, without the network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: $(READY) ## the benchmarks that run here, small
	$(BIN)/radix-mlp bench --quick

clean: ## remove .venv and caches
	rm -rf .venv site .pytest_cache .mypy_cache .ruff_cache .hypothesis build src/*.egg-info

$(DEMO): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("radix-mlp needs Python 3.11 or later: make PYTHON=python3.12 ...")'
	@echo "setting up .venv (a minute or two the first time)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(READY): $(DEMO)
	@echo "adding what the tests need (a few minutes the first time)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(SITE): $(DEMO)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@
