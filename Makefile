# Every target sets up what it needs in .venv, made by PYTHON (3.11 or newer). A second call is fast.
PYTHON ?= python3
JOBS ?= 2

BIN := .venv/bin
READY := .venv/ready
# Kernels in public use, which the model of ours is compared with.
REFERENCE := build/reference/ready
# What an installation is made from: when one of these is newer than the stamp, install again.
BUILT_FROM := pyproject.toml constraints.txt $(wildcard setup.py CMakeLists.txt) $(shell find csrc -type f 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench quality model sanitize gpu-check

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: $(READY)  ## install nabla, editable, with all that the other targets need

$(READY): $(BUILT_FROM)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nabla needs Python 3.11 or newer, not " + sys.version.split()[0] + ": make PYTHON=/path/to/python")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --editable '.[dev]' --constraint constraints.txt
	@touch $@

demo: $(READY)  ## dense and NABLA attention side by side on a real clip, about two minutes
	$(BIN)/nabla demo

$(REFERENCE): benchmarks/reference.txt | $(READY)
	$(BIN)/python -m pip download --no-deps --require-hashes --only-binary :all: --platform manylinux_2_24_x86_64 --dest $(@D) --requirement $<
	@touch $@

test: $(READY) $(REFERENCE)  ## the test suite
	$(BIN)/python -m pytest --numprocesses $(JOBS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest --numprocesses $(JOBS)

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --diff .
	$(BIN)/mypy

bench: $(READY)  ## the benchmarks of the stages, on this machine
	$(BIN)/python -m benchmarks.block_mask
	$(BIN)/python -m benchmarks.block_attention

quality: OUT ?= out/quality
quality: $(READY)  ## does NABLA cost quality? Trains and compares tiny models, 40 minutes on two cores
	$(BIN)/python -m benchmarks.quality $(OUT)

model: $(READY) $(REFERENCE)  ## what the CUDA kernels can reach at most, by their machine code
	$(BIN)/python -m benchmarks.bounds

# The sanitizers' runtime has to be there before torch throws: libasan alone would crash then.
sanitize: $(READY)  ## the tests of the native kernels, built with address and undefined sanitizers
	NABLA_SANITIZE=ON NABLA_SKIP_CUDA=1 $(BIN)/python -m pip install . --no-deps --upgrade --target build/sanitize
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitize $(BIN)/pytest tests/test_cpu.py -k "not threads" --timeout 1200 --numprocesses $(JOBS)

# A PYTHON that is named is taken; else the one in .venv, if it is there.
gpu-check: OUT ?= out/gpu-check
gpu-check:  ## on a machine with CUDA: build, tests, sanitizer, benchmark into OUT, no network
	$(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(BIN)/python),$(PYTHON)),$(PYTHON)) -m benchmarks.gpu_check $(OUT)
