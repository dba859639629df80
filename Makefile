# Everything a contributor runs. `make demo` and `make test` are all that a fresh machine needs.
#
#   PYTHON           interpreter to build .venv from; default: the first python3 that is 3.11 or newer
#   TORCH_INDEX_URL  where torch comes from, for example https://download.pytorch.org/whl/cu130 for CUDA;
#                    default: the CPU build, wherever pip finds one (see README, "Install")
#   PYTEST_ARGS      more arguments for pytest, for example PYTEST_ARGS='-k exchange -x'
#   TEST_PROCESSES   how many files of tests run at a time in `make test` (default 2; 0: all in one process)
#   BENCH_ARGS       arguments for the serving benchmark: where its peers are (benchmarks/README.md)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
NPU_VENV := .venv-npu
FAKE_CANN := $(CURDIR)/.cache/fake-cann
PYTHON ?=
TORCH_INDEX_URL ?=
PYTEST_ARGS ?=
TEST_PROCESSES ?= 2
BENCH_ARGS ?=

.PHONY: help setup setup-npu demo test test-all test-slow test-compose test-npu lint format types protos check bench clean

help:  ## Say what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 14

setup: $(VENV)/.installed  ## Create .venv and install everything (quick when up to date)

# Another source of torch is asked for: install even when .venv is up to date.
ifneq ($(TORCH_INDEX_URL),)
.PHONY: $(VENV)/.installed
endif

$(VENV)/.installed: pyproject.toml scripts/setup.sh hatch_build.py $(wildcard common/native/*.cpp common/native/*.h common/native/*.py)
	@PYTHON='$(PYTHON)' TORCH_INDEX_URL='$(TORCH_INDEX_URL)' scripts/setup.sh $(VENV)
	@touch $@

demo: setup  ## Start a router and two expert workers on the demo model and stream an answer
	@scripts/demo.sh $(BIN)

# Many tests wait for processes that they start: two at a time make use of two cores. A file stays together.
test: setup  ## Run the tests (no accelerator needed)
	@$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_ARGS)

test-all: setup  ## Run the slow tests too
	@$(BIN)/python -m pytest -m 'not cuda and not npu and not compose' $(PYTEST_ARGS)

test-slow: setup  ## Run only the tests that `make test` leaves out for their length
	@$(BIN)/python -m pytest -m 'slow and not cuda and not npu and not compose' $(PYTEST_ARGS)

test-compose: setup  ## Build the image and run the compose files with a Docker engine
	@$(BIN)/python -m pytest -m compose $(PYTEST_ARGS)

# torch_npu breaks a plain `import torch` where there is no CANN: it has an environment of its own.
$(NPU_VENV)/.installed: pyproject.toml scripts/setup.sh
	@PYTHON='$(PYTHON)' EXTRAS=npu,test scripts/setup.sh $(NPU_VENV)
	@touch $@

$(FAKE_CANN)/.built: $(NPU_VENV)/.installed $(wildcard tests/npu/fake_cann/*)
	@rm -rf $(FAKE_CANN)
	@$(NPU_VENV)/bin/python -m tests.npu.fake_cann.build $(FAKE_CANN)
	@touch $@

setup-npu: $(FAKE_CANN)/.built  ## Create .venv-npu with torch_npu, and build the fake CANN

test-npu: setup-npu  ## Run the NPU path: the real torch_npu on a fake CANN (see docs/npu.md)
	@FAKE_CANN=$(FAKE_CANN) PYTHONPATH=tests/npu/site $(NPU_VENV)/bin/python -m pytest -m npu tests/npu $(PYTEST_ARGS)

lint: setup  ## Style, and who imports whom
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports

format: setup  ## Put the code in shape
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: setup  ## Check the types
	@$(BIN)/mypy

protos: setup  ## Generate protos/*_pb2* from protos/*.proto
	@$(BIN)/python -m grpc_tools.protoc -I. --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
	  --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --python_out=. --mypy_out=. --mypy_grpc_out=. --grpc_python_out=. protos/*.proto
	@echo 'protos: generated; commit what changed'

check: lint types test  ## What has to be green before a commit

bench: setup  ## Run the benchmarks of benchmarks/ (see its README)
	@$(BIN)/python -m benchmarks.bench_exchange
	@OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.bench_int8
	@OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.bench_micro_batches .cache/v2-lite-layers
	@$(BIN)/python -m benchmarks.cpu_serving $(BENCH_ARGS)
	@$(BIN)/python -m benchmarks.bench_memory .cache/v2-lite-w8a8-head

clean:  ## Remove what was made: environment, benchmark checkpoints, caches
	@rm -rf $(VENV) $(NPU_VENV) common/native/*.so .cache build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
