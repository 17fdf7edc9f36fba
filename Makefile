# trustlog: every target creates .venv from the hashed lock first; nothing else is needed before it.
.DEFAULT_GOAL := help
.SHELLFLAGS := -eu -o pipefail -c
SHELL := bash

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# .venv is rebuilt when the lock or the project description changes.
STAMP := $(VENV)/.installed

.PHONY: help install check format test cover demo bench sim lock clean

help: ## Show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1	\2/p' Makefile | expand -t 22

install: $(STAMP) ## Create .venv and install the locked dependencies

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "trustlog needs Python 3.11 or newer; say which with: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# Programs are started as `python -m`, so that a directory with a space in its name does no harm.
check: $(STAMP) ## Formatting, lint, types and the import layers
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/python tests/check_layers.py

format: $(STAMP) ## Format the code and apply safe lint fixes
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

test: $(STAMP) ## Run the tests (TESTS="tests/trustlog -k seal" for some of them)
	$(BIN)/python -m pytest $(TESTS)

cover: $(STAMP) ## Run the tests with branch coverage
	$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered $(TESTS)

demo: $(STAMP) ## Three real replicas order real requests (KEEP=1 leaves them running)
	$(BIN)/python deploy/demo/demo.py $(if $(KEEP),--keep)

bench: $(STAMP) ## Measure a durable three-replica cluster on this machine
	$(BIN)/python -m client.bench $(BENCH)

sim: $(STAMP) ## Try to break the protocol in a simulated world (SEEDS=1000 FIRST=0)
	$(BIN)/python -m replica.cli.main sim --seeds $(or $(SEEDS),200) --first $(or $(FIRST),0)

lock: ## Renew requirements.lock (needs pip-tools)
	pip-compile --quiet --extra dev --generate-hashes --no-emit-index-url --no-emit-trusted-host \
	  --no-emit-find-links --no-header --strip-extras --allow-unsafe --no-annotate -o requirements.lock pyproject.toml

clean: ## Remove what the targets above made
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
