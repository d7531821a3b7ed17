# People and CI run the same targets. `make demo` and `make test` are the two to start with.
#
# PYTHON is the interpreter that makes the virtual environment; it must be 3.11 or newer.
# TORCH is installed before everything else, pinned: an open range would replace a CPU build that is already there by
# the newest release with its GPU libraries. Another build: make demo TORCH=torch==...

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Tests run in one process per core and one more, for they sometimes wait, at most 8: each imports everything (ten seconds
# of a core), holds a service and, in some tests, PyTorch (half a gigabyte).
PARALLEL ?= -n $(shell echo $$(($$(getconf _NPROCESSORS_ONLN) + 1))) --maxprocesses 8 --dist worksteal
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
DEV := $(VENV)/.installed-dev
DEMO := $(VENV)/.installed-demo
BENCHES := strip draw oversight console ingest selection ratios stream step budget classincremental gem criterion qualities

# The tests and the benchmarks count on one thread per process: more only fight over the cores.
export OMP_NUM_THREADS ?= 1
# Containers often forbid it, and then each of the hundreds of processes of the tests compiles what it imports.
export PYTHONDONTWRITEBYTECODE =

.NOTPARALLEL:
.PHONY: help install test slow browser screenshots kills fuzz fuzz-quick lint format types check docs site pictures evidence screenshots demo bench bench-quick clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

install: $(DEV) ## everything a developer needs, in .venv

test: $(DEV) ## the default tests (under three minutes on two cores, no network)
	$(BIN)/python -m pytest -q $(PARALLEL) $(PYTEST_ARGS)

slow: $(DEV) ## the long tests: kills and restarts, the demo, much fuzzing
	$(BIN)/python -m pytest -q -m slow $(PARALLEL) $(PYTEST_ARGS)

browser: $(DEV) ## the console in a headless Chromium (Debian's packages chromium and chromium-driver)
	$(BIN)/python -m pytest -q -m browser tests/browser $(PYTEST_ARGS)

screenshots: $(DEV) ## write docs/images/console-*.png: the console with buffers of its own, in a headless Chromium
	$(BIN)/python -m tests.browser.screenshots

fuzz: $(DEV) ## 20,000 requests and more made from the interface description, valid and not (half an hour)
	$(BIN)/python -m tests.fuzz --cases 20000

fuzz-quick: $(DEV) ## a part of it (under 2 minutes)
	$(BIN)/python -m tests.fuzz --cases 1500

lint: $(DEV) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV) ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(DEV) ## mypy --strict
	$(BIN)/mypy

KILLS ?= 200

kills: $(DEV) ## services, workers, mirrors, registrations and migrations are killed at random and at every step
	KILLS=$(KILLS) $(BIN)/python -m pytest -q -m "slow or not slow" tests/service/test_faults.py --timeout 3000 $(PYTEST_ARGS)

check: lint types site fuzz-quick slow browser test ## what CI runs

docs: $(DEV) ## write the tables of the documentation from the code
	$(BIN)/python -m docs.tables

site: $(DEV) ## build the documentation as a site, in build/site (no network); a warning is an error
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/python -m mkdocs build --quiet

pictures: $(DEV) ## draw the pictures of the concepts page
	$(BIN)/python -m docs.pictures

evidence: $(DEV) ## write the numbers and draw the pictures of the page of evidence from bench/results
	PYTHONPATH=bench $(BIN)/python -m docs.evidence

demo: $(DEMO) ## start a service, learn Fashion-MNIST class by class against it, print the table, stop the service
	$(BIN)/python -m engram_trainer.demo

bench: $(DEV) ## every benchmark in full (many hours; what is done is kept)
	set -e; for name in $(BENCHES); do $(BIN)/python bench/$$name.py; done

bench-quick: $(DEV) ## every benchmark, under 45 s each
	set -e; for name in $(BENCHES); do $(BIN)/python bench/$$name.py --quick; done

clean: ## remove the environment and the caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Engram needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(DEV): pyproject.toml | $(BIN)/python
	$(PIP) "$(TORCH)"
	$(PIP) -e ".[dev]"
	@touch $(DEV) $(DEMO)

$(DEMO): pyproject.toml | $(BIN)/python
	$(PIP) "$(TORCH)"
	$(PIP) -e ".[service,trainer]"
	@touch $(DEMO)
