# make demo      the whole method on a small real model; ends in a table and a report
# make test      the fast tests
# make lint      format, lint, spelling and types
# make test-all  all of these, the slow tests, and the most important ones compiled as a run is
# make test-gpu  on a GPU: the tests of what runs there; python benchmarks/gpu.py measures the rest
# make bench     time one step of each stage
# make docs      the documentation as a site, in build/site
# Each creates the environment it needs in .venv first. Another interpreter: make test PYTHON=python3.12 VENV=.venv-3.12
# Tests run in JOBS processes (2). make test SLOW=yes runs those marked slow too, which share with the fast ones of their
# file what these have compiled.
# Paths are relative and tools run as modules, so a directory name with spaces is fine.

PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= work/demo
JOBS ?= 2
# Files of tests whole, since theirs share what is compiled, in the order of conftest.py. Most of
# those for eight devices are in one file: they are shared out one by one. A process that crashes ends the run with the
# name of its test: with one started in its place, pytest-xdist 3.8 waits for ever.
PYTEST = $(RUN) -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0
CHOSEN = not long$(if $(SLOW),, and not slow)
RUN := "$(VENV)/bin/python"

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Containers often set it; then each of the many processes that tests start would compile all modules, for 2 seconds.
export PYTHONDONTWRITEBYTECODE :=
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help demo test smoke test-all test-gpu lint bench docs clean env env-dev
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -7

demo: env
	$(RUN) -m moextend_jax demo --workdir "$(WORKDIR)"

test: env-dev
	$(PYTEST) -m "$(CHOSEN) and not devices"
	MOEXTEND_TEST_DEVICES=8 $(PYTEST) --dist worksteal -m "$(CHOSEN) and devices"

test-all: SLOW = yes
test-all: lint test smoke

# The most important tests once more, compiled as a run is.
smoke: env-dev
	XLA_FLAGS= $(PYTEST) -m "smoke and not slow"

# On a machine with a GPU, in an environment that has JAX with CUDA: pip install -e ".[gpu,dev]" into VENV.
test-gpu:
	MOEXTEND_TEST_PLATFORM=cuda JAX_DEFAULT_MATMUL_PRECISION=highest XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_FLAGS= \
	  $(PYTEST) -m gpu -W default

lint: env-dev
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m codespell_lib *.md configs docs examples launch moextend_jax tools
	$(RUN) -m pyright --pythonpath $(RUN)

bench: env
	$(RUN) -m moextend_jax bench bench

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

clean:
	rm -rf "$(VENV)" build *.egg-info .pytest_cache .ruff_cache
	find moextend_jax configs tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

env: $(VENV)/.run
env-dev: $(VENV)/.dev

# pip -qq: errors only; its warnings are about the machine's own settings.
$(VENV)/.run: requirements.txt constraints.txt pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "$(PYTHON) is not Python 3.11 to 3.13: name one that is, e.g. make PYTHON=python3.12" >&2; exit 1; }
	@echo "installing into $(VENV) (a minute or two, once)"
	@"$(PYTHON)" -m venv "$(VENV)"
	@$(RUN) -m pip install -qq -c constraints.txt -e .
	@touch "$@"

$(VENV)/.dev: $(VENV)/.run
	@$(RUN) -m pip install -qq -c constraints.txt -e ".[dev]"
	@touch "$@"

$(VENV)/.docs: $(VENV)/.run
	@$(RUN) -m pip install -qq -c constraints.txt -e ".[docs]"
	@touch "$@"
