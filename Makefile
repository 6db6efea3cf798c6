# Set-up, training, tests and checks, each in one command. Needs make (3.81 or newer) and Python.

PYTHON ?= python3
UV ?= uv
ARGS ?=
BIN = .venv/bin
# Written last, so an interrupted install is taken up again, and a finished one is not repeated.
INSTALLED = .venv/installed

.DEFAULT_GOAL := help
.PHONY: help setup setup-locked setup-cpu venv same-python train test test-all torture bench check audit format lock clean

help:
	@echo 'make train      train; overrides in ARGS: make train ARGS="model=resnet50 data=cifar10"'
	@echo 'make test       the tests that need neither network, GPU nor patience; ARGS goes to pytest'
	@echo "make test-all   every test; those for a GPU by themselves: ARGS='-m gpu'"
	@echo 'make torture    kills, signals, damaged files, a full disk, bad data; N=50 for a long one'
	@echo 'make bench      how fast it is, into docs/benchmark.md; an hour, or ARGS=--quick'
	@echo 'make check      ruff, mypy, import floors'
	@echo 'make audit      known vulnerabilities of the locked packages, where the database can be reached'
	@echo 'make format     put the code in order, where ruff can'
	@echo 'make lock       resolve requirements.lock again, after a change in pyproject.toml (needs uv);'
	@echo '                ARGS="--upgrade" takes the newest versions'
	@echo 'make clean      remove caches; the runs in logs/ and .venv stay'
	@echo 'make setup      install into .venv; all of the above do it where needed, once'
	@echo 'make setup-cpu  the same without CUDA, for a machine without a GPU (needs uv):'
	@echo '                uv pip install --torch-backend=cpu ...'
	@echo
	@echo 'Another Python than python3: make setup PYTHON=python3.12'

setup: $(INSTALLED)

# setuptools comes first, from the lock too: with it the one package that has no wheel
# (antlr4-python3-runtime, of hydra) is built without a download that no hash covers.
$(INSTALLED): requirements.lock pyproject.toml | same-python
	@$(MAKE) --no-print-directory $$(if [ -e .venv/cpu ]; then echo setup-cpu; else echo setup-locked; fi)

setup-locked: venv
	@if [ -e $(INSTALLED) ]; then echo 'Updating .venv'; else \
	  echo 'Installing into .venv: on Linux a download of 3.2 GB (CUDA included), 6 GB on disk, some minutes.'; \
	  echo 'No GPU? Stop this and see make help, setup-cpu.'; fi
	@rm -f $(INSTALLED)
	@sed -n '/^setuptools==/,/[^\\]$$/p' requirements.lock > .venv/build.txt
	@$(BIN)/python -m pip install --quiet --require-hashes -r .venv/build.txt
	@$(BIN)/python -m pip install --quiet --require-hashes --no-build-isolation -r requirements.lock
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $(INSTALLED)
	@echo 'Installed.'

# The CPU build of torch has other hashes than the lock: same versions, hashes unchecked.
setup-cpu: venv
	@command -v $(UV) > /dev/null || { \
	  echo 'uv is missing: https://docs.astral.sh/uv, or $(PYTHON) -m pip install uv' >&2; exit 1; }
	@rm -f $(INSTALLED)
	@touch .venv/cpu
	$(UV) pip install --python .venv --torch-backend=cpu --no-verify-hashes -c requirements.lock -e '.[dev]'
	@touch $(INSTALLED)

# A PYTHON that was typed must not be passed over because .venv is there already.
same-python:
ifeq ($(origin PYTHON),command line)
	@[ ! -x $(BIN)/python ] || { \
	  version='import sys; print("%d.%d" % sys.version_info[:2])'; \
	  here=$$($(BIN)/python -c "$$version"); asked=$$($(PYTHON) -c "$$version") || exit 1; \
	  [ "$$here" = "$$asked" ] || { \
	    echo ".venv has Python $$here, and PYTHON=$(PYTHON) is $$asked; to make it anew: rm -rf .venv" >&2; \
	    exit 1; }; }
endif

venv: same-python
	@[ -x $(BIN)/pip ] || $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	  echo '$(PYTHON) is not Python 3.11, 3.12 or 3.13; name one: make setup PYTHON=python3.13' >&2; exit 1; }
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv --clear .venv

train: $(INSTALLED)
	@$(BIN)/python train.py $(ARGS)

# One thread per worker: two workers that each start a thread per core wait for one another.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test: $(INSTALLED)
	$(PYTEST) -m 'not slow and not gpu and not network' $(ARGS)

test-all: $(INSTALLED)
	$(PYTEST) $(ARGS)

N ?= 5
torture: $(INSTALLED)
	@$(BIN)/python tests/torture.py $(N) $(ARGS)

bench: $(INSTALLED)
	@$(BIN)/python tests/bench.py $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Offline it fails in its own words; an index without advisories knows no package at all.
audit: $(INSTALLED)
	@code=0; $(BIN)/pip-audit --progress-spinner off --timeout 5 --disable-pip --require-hashes -r requirements.lock \
	  > .venv/audit.txt 2>&1 || code=$$?; \
	if grep -Eq 'ConnectionError|ServiceError|Max retries' .venv/audit.txt || \
	  [ $$(grep -c 'could not be audited' .venv/audit.txt) -gt 50 ]; then \
	  echo 'audit skipped: no database of advisories can be reached'; \
	else cat .venv/audit.txt; exit $$code; fi

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock:
	@command -v $(UV) > /dev/null || { \
	  echo 'uv is missing: https://docs.astral.sh/uv, or $(PYTHON) -m pip install uv' >&2; exit 1; }
	$(UV) pip compile --no-config --quiet --universal --python-version 3.11 --extra dev --generate-hashes \
	  --no-emit-index-url --no-annotate --custom-compile-command 'make lock' $(ARGS) \
	  pyproject.toml -o requirements.lock

clean:
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache build dist
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
