# `make help` lists the targets. Needs git, make and Python 3.10 or later; the rest goes to .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCH := .venv-bench
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
MANIFESTS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow check bench reproduce docs clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(VENV)/.installed ## train a network on the digits and write its report
	$(BIN)/deepspectra demo

test: $(VENV)/.installed-dev ## run the tests
	$(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.installed-dev ## run the long reproductions, which the tests leave out
	$(BIN)/python -m pytest -m slow --slow

check: $(VENV)/.installed-dev ## check format, lint, types and the arrows between modules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(BENCH)/.installed ## measure cost and accuracy beside the peers, write docs/benchmarks.md
	OMP_NUM_THREADS=1 $(BENCH)/bin/python -m benchmarks $(BENCH_OPTIONS)

reproduce: $(VENV)/.installed-dev ## measure the papers' claims on DEEPSPECTRA_DATA (hours) and write their pages in docs/
	$(BIN)/python -m reproductions
	$(BIN)/python -m reproductions.coverage
	$(BIN)/python -m reproductions.certificates
	$(BIN)/python -m reproductions.resolution
	$(BIN)/python -m reproductions.language_model
	$(BIN)/python -m reproductions.large_networks

docs: $(VENV)/.installed-docs ## run what the documents show, and build their site in site/
	DEEPSPECTRA_DRAW=1 $(BIN)/python -m pytest -q --slow tests/test_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q
	@echo "Documents: site/index.html"

clean: ## remove the environment and every cache
	rm -rf $(VENV) $(BENCH) build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "deepspectra needs Python 3.10 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(MANIFESTS) | $(BIN)/python
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(MANIFESTS) tests/oracle.txt | $(BIN)/python
	$(PIP_INSTALL) -e '.[dev]'
	$(PIP_INSTALL) --no-deps -r tests/oracle.txt || echo "The outside oracle cannot be installed here: its tests skip."
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: $(MANIFESTS) | $(BIN)/python
	$(PIP_INSTALL) -e '.[dev,docs]'
	@touch $@ $(VENV)/.installed

# The peers have an environment of their own. Without them, on a machine that cannot reach them, we are measured alone.
$(BENCH)/.installed: $(MANIFESTS) benchmarks/peers.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --pre -r benchmarks/peers.txt \
	  || echo "The peers cannot be installed here: deepspectra is measured alone."
	@touch $@
