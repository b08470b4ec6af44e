# `make demo` runs the main job, `make test` the tests; both set up .venv on a fresh machine.
# `make test` leaves out the long tests: `make test-share` runs a sixth of them, which SEED chooses
# (else the clock), `make test-slow` all, `make test-all` every test; `make docs` builds the site.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# A CPU build of torch is enough for everything here; where pip's default is a CUDA build of several
# GB, TORCH can name another wheel or version.
TORCH ?= torch==2.13.0
export OMP_WAIT_POLICY ?= PASSIVE
PYTEST := $(BIN)/pytest -n 2 --durations=25

.PHONY: demo test test-share test-slow test-all docs install

demo: $(VENV)/.runtime
	$(BIN)/audio-lens map --out map.html

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) -m "not slow"

test-share: $(VENV)/.dev
	$(PYTEST) -m slow --share 6 $(if $(SEED),--share-seed $(SEED))

test-slow: $(VENV)/.dev
	$(PYTEST) -m slow

test-all: $(VENV)/.docs
	$(PYTEST)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

install: $(VENV)/.dev

$(VENV)/.runtime: setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.dev
	$(BIN)/pip install --quiet --editable '.[dev,docs]'
	touch $@
