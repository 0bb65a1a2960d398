# Every target prints what it does and can be run again; `make` alone lists them.
# PYTHON picks the interpreter of a new .venv, WORKERS the number of test processes.

PYTHON  ?= python3
WORKERS ?= 2

VENV  := .venv
PY    := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# pyright asks the network for a newer version of itself unless told not to.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
export PIP_DISABLE_PIP_VERSION_CHECK  := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
.PHONY: help venv demo test test-slow test-gpu sanitize check format bench bench-cpu clean

help: ## list the targets
	@echo "microscale: make <target>"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP) ## create .venv with the pinned requirements and microscale itself
	@echo "venv: $(VENV) is ready"

KERNELS := CMakeLists.txt $(shell find csrc -type f)

# An editable installation knows the packages that were there when it was made.
PACKAGES := $(shell find src -name __init__.py)

$(STAMP): requirements.txt pyproject.toml $(KERNELS) $(PACKAGES)
	@echo "venv: installing requirements.txt into $(VENV) (minutes the first time)"
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else "microscale needs Python 3.10 or newer, but $(PYTHON) is %d.%d; name another one: make venv PYTHON=python3.11" % v[:2])'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --requirement requirements.txt
	@$(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .
	@$(PY) -m microscale --version
	@touch $@

demo: $(STAMP) ## run examples/demo.py
	@echo "demo: $(PY) examples/demo.py"
	@$(PY) examples/demo.py

test: $(STAMP) ## run the tests that are neither slow nor need a GPU
	@echo "test: pytest with $(WORKERS) workers, without the slow and GPU tests"
	@$(PY) -m pytest -n $(WORKERS) -m "not slow and not gpu"

test-slow: $(STAMP) ## run every test that needs no GPU, slow ones included
	@echo "test-slow: pytest with $(WORKERS) workers, slow tests included"
	@$(PY) -m pytest -n $(WORKERS) -m "not gpu"

test-gpu: $(STAMP) ## run the GPU tests; fails where there is no GPU or no such test
	@echo "test-gpu: pytest on the GPU tests"
	@MICROSCALE_REQUIRE_GPU=1 $(PY) -m pytest -m gpu || { status=$$?; \
	  if [ $$status -eq 5 ]; then echo "test-gpu: no GPU test was collected, so nothing was tested"; fi; exit $$status; }

sanitize: $(STAMP) ## run kernel tests under the address and undefined-behaviour sanitizers (TESTS="tests/kernels")
	@echo "sanitize: .ci/sanitize $(TESTS)"
	@WORKERS=$(WORKERS) .ci/sanitize $(TESTS)

check: $(STAMP) ## check format, lint and types, changing nothing
	@echo "check: ruff format --check"
	@$(PY) -m ruff format --check .
	@echo "check: ruff check"
	@$(PY) -m ruff check .
	@echo "check: pyright (strict on src, basic on tests)"
	@$(PY) -m pyright --pythonpath $(PY)

format: $(STAMP) ## format the code and apply ruff's safe fixes
	@echo "format: ruff check --fix, then ruff format"
	@$(PY) -m ruff check --fix-only .
	@$(PY) -m ruff format .

bench: $(STAMP) ## measure the reference kernels on this machine
	@echo "bench: $(PY) benchmarks/reference_speed.py"
	@$(PY) benchmarks/reference_speed.py

bench-cpu: $(STAMP) ## measure the CPU kernels against the machine and peers (BENCH="--quick --peer-python PEER/bin/python")
	@echo "bench-cpu: $(PY) -m benchmarks.cpu $(BENCH)"
	@$(PY) -m benchmarks.cpu $(BENCH)

clean: ## remove caches and build outputs (.venv stays; remove it by hand for a fresh install)
	@echo "clean: removing caches and build outputs"
	@rm -rf build dist .pytest_cache .ruff_cache .hypothesis .coverage htmlcov
	@find src tests examples benchmarks -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
