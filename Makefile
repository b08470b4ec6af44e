# `make demo` runs the main job, `make test` the tests; both set up .venv on a fresh machine.
# `make test` leaves out the long tests: `make test-share` runs a sixth of them, which SEED chooses
# (else the clock), `make test-slow` all, `make test-all` every test; `make docs` builds the site.
# The share leaves out files whose long tests take minutes each (MINUTES): `make test-slow` has them.
# `make types` counts what pyright finds wrong and writes the numbers that have fallen.
# All of them install the known versions of constraints.txt, which `make versions` renews.
# `make lower-bounds` tests with the oldest versions that setup.cfg allows.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# A CPU build of torch is enough for everything here; where pip's default is a CUDA build of several
# GB, TORCH can name another wheel or version.
TORCH ?= torch
KNOWN := --constraint constraints.txt --build-constraint constraints.txt
export OMP_WAIT_POLICY ?= PASSIVE
# One worker runs a file, so that what its tests share is made once; the last files are quick ones.
PYTEST := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=25

MINUTES := $(addprefix analysis/test_, \
	adapters adapters_sweep autoencoder_floors autoencoders circuits interchange \
	modality_gap neurons subspaces tap) \
	patching/test_direct_paths

.PHONY: demo test test-share test-slow test-all types docs install versions lower-bounds

demo: $(VENV)/.runtime
	$(BIN)/audio-lens map --out map.html

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) -m "not slow"

test-share: $(VENV)/.dev
	$(PYTEST) -m slow --share 6 $(if $(SEED),--share-seed $(SEED)) $(MINUTES:%=--ignore=tests/%.py)

test-slow: $(VENV)/.dev
	$(PYTEST) -m slow

test-all: $(VENV)/.docs
	$(PYTEST)

types: $(VENV)/.dev
	$(BIN)/python tests/type_errors.py

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

install: $(VENV)/.dev

# A throw-away environment from the ranges of setup.cfg, frozen: without what only CUDA builds of
# torch bring, and without the local tag of CPU builds, so that it holds on every machine.
versions:
	$(PYTHON) -m venv --clear build/versions
	build/versions/bin/pip install --quiet --upgrade pip
	build/versions/bin/pip install --quiet $(TORCH)
	build/versions/bin/pip install --quiet $(TORCH) --editable '.[dev,docs]'
	build/versions/bin/pip freeze --all --exclude-editable > build/frozen.txt
	echo '# Known versions, renewed by `make versions`' > constraints.txt
	sed -E '/^(cuda|nvidia|triton)/d; s/[+].*//' build/frozen.txt \
	  | LC_ALL=C sort --ignore-case >> constraints.txt
	rm -r build/versions

LOWEST := build/lowest
lower-bounds:
	$(PYTHON) -m venv --clear $(LOWEST)
	$(PYTHON) .ci/versions.py lowest > build/lowest.txt
	$(LOWEST)/bin/pip install --quiet --upgrade pip
	$(LOWEST)/bin/pip install --quiet --constraint build/lowest.txt --editable '.[dev]'
	$(LOWEST)/bin/audio-lens map --out build/lowest.html
	$(LOWEST)/bin/pytest -n 2 -m "not slow" tests/test_timeline.py tests/test_hooks.py \
	  tests/test_audio.py tests/test_cache.py tests/test_metrics.py tests/test_cli.py \
	  tests/patching/test_toys.py tests/patching/test_sweep.py tests/models/test_loading.py \
	  tests/models/test_lora.py
	$(LOWEST)/bin/pytest -n 2 -m "not slow" tests/models/test_parity.py -k whisper

$(VENV)/.runtime: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade --constraint constraints.txt pip
	$(BIN)/pip install --quiet $(KNOWN) $(TORCH)
	$(BIN)/pip install --quiet $(KNOWN) --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/pip install --quiet $(KNOWN) --editable '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.dev
	$(BIN)/pip install --quiet $(KNOWN) --editable '.[dev,docs]'
	touch $@
