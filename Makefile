# `make demo` runs the main job, `make test` the tests; both set up .venv on a fresh machine.
# `make test-slow` runs the long tests, which `make test` leaves out; `make docs` builds the site.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# A CPU build of torch is enough for everything here; where pip's default is a CUDA build of several
# GB, TORCH can name another wheel or version.
TORCH ?= torch==2.13.0
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-slow docs install

demo: $(VENV)/.runtime
	$(BIN)/audio-lens map --out map.html

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest -n 2 -m "not slow"

test-slow: $(VENV)/.dev
	$(BIN)/pytest -n 2 -m slow

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
