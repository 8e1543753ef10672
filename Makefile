# dsv3: every target does its own set-up. A machine with a GPU: make quickstart TORCH=torch==2.11.0
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: help quickstart pipeline test test-all lint docs format clean

help:            ## what there is to make
	@grep -E '^[a-z-]+: .*##' Makefile | sed -E 's/:.*## +/\t/' | expand -t 16

# torch first and alone: a CPU machine then never draws CUDA packages through somebody's dependency. The list is
# whole, so nothing is resolved: what only lm-eval's own tasks need (source packages) stays out.
$(VENV)/ready: pyproject.toml requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dsv3 needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# A CUDA build of torch brings the Triton it was made with; a CPU build brings none, and tests of kernels need one.
$(VENV)/triton: $(VENV)/ready
	$(BIN)/python -c 'import triton' 2>/dev/null || \
	  $(BIN)/pip install --quiet --disable-pip-version-check --no-deps "triton==3.9.0; sys_platform == 'linux'"
	touch $@

quickstart: $(VENV)/ready   ## train a tiny model, sample from it, draw the pictures (under 10 minutes on 2 cores)
	$(BIN)/dsv3 quickstart

pipeline: $(VENV)/ready     ## every stage over three seeds, and a page of it (under an hour on 2 cores; FAST=1: a minute)
	$(BIN)/dsv3 bench end-to-end recipes/pipeline-$(if $(FAST),fast,tiny).yaml

test: $(VENV)/triton        ## the test suite
	$(BIN)/python -m pytest -n logical --dist loadfile

test-all: $(VENV)/triton    ## also the slow, GPU and network tests
	$(BIN)/python -m pytest -m '' -n logical --dist loadfile

lint: $(VENV)/ready         ## ruff, mypy, and DESIGN's floors
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/ready         ## the documentation as a site in build/site, readable without a network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

format: $(VENV)/ready       ## put the code into its form
	$(BIN)/ruff check --fix --quiet src tests
	$(BIN)/ruff format --quiet src tests

clean:           ## remove the environment and caches (runs/ and data/ stay)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
