# Everything a contributor runs is one word. Each target sets up what it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
CPP    := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
FORMAT := $(CPP) $(wildcard benchmarks/*.cpp tests/native/*.cpp)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full bench docs soak gpu-check cuda-build-check lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.built  ## make .venv, install everything, build the extension

demo: setup  ## train, certify and invert a small network; writes demo/report.html
	$(BIN)/iresnet-fast demo --out demo

test: setup  ## the tests a contributor runs all day (under 5 minutes)
	$(BIN)/pytest

test-full: setup  ## the slow tests: installs, documents, sanitizers, killed jobs (under 20 minutes)
	$(BIN)/pytest -m "full and not gpu and not soak" --timeout 900

bench: setup  ## every benchmark on this machine (python -m benchmarks --help for less)
	$(BIN)/python -m benchmarks

docs: setup  ## the site, in build/docs; a warning is an error
	$(BIN)/sphinx-build -W -q -b html docs build/docs

soak: setup  ## kill training and jobs over files, by every engine and at random moments (a quarter of an hour)
	$(BIN)/pytest -m "soak and not gpu" --timeout 900
	$(BIN)/python -m benchmarks.soak --minutes 10

# make gpu-check PYTHON=python3 uses that interpreter as it is; it needs no network then.
ifeq ($(origin PYTHON),command line)
GPU_PYTHON := $(PYTHON)
else
GPU_PYTHON := $(BIN)/python
gpu-check: setup
endif
OUT ?= gpu-check

gpu-check:  ## everything that needs a CUDA GPU: build, tests, ceilings, benchmarks; results in OUT
	$(GPU_PYTHON) -m benchmarks.gpu_check --out $(OUT)

cuda-build-check:  ## compile, link and load the CUDA extension beside a CUDA build of torch (needs nvcc, no GPU)
	benchmarks/cuda_build_check.sh $(PYTHON)

lint: setup  ## ruff, mypy and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMAT)

format: setup  ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMAT)

clean:  ## remove the environment and everything built
	rm -rf $(VENV) .venv-cuda .venv-oldest gpu-check build dist demo *.egg-info iresnet_fast/*.so .pytest_cache .mypy_cache .ruff_cache

# The two stamps keep second runs short: packages again only when the pins change, the build only with its sources.
$(VENV)/.packages: requirements-dev.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("iresnet_fast needs Python >= 3.11, and $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(VENV)/.built: $(VENV)/.packages pyproject.toml setup.py $(CPP)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@
