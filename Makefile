# Every target sets up what it needs in .venv, made by PYTHON (3.11 or newer). A second call is fast.
PYTHON ?= python3
JOBS ?= 2
# What a CPU measures; the first is `make bench`.
PRESETS := cpu scaling k6-sr-tile k5-lite-10s k5-pro-10s-sd k5-pro-5s-hd wan14b-720p k5-pro-10s-hd

BIN := .venv/bin
READY := .venv/ready
# Kernels in public use, which the model of ours is compared with.
REFERENCE := build/reference/ready
# What an installation is made from: when one of these is newer than the stamp, install again.
BUILT_FROM := pyproject.toml constraints.txt $(wildcard setup.py CMakeLists.txt) $(shell find csrc -type f 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help setup demo test mutations lint bench bench-full bench-ci results readme quality model sanitize aarch64 gpu-check

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

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

mutations: $(READY)  ## are all waits, fences and barriers of the CUDA kernels needed? Leaves out each in turn
	$(BIN)/python -m pytest tests/test_cuda_mutations.py -m '' --numprocesses $(JOBS)

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --diff .
	$(BIN)/mypy

bench: $(READY)  ## the benchmarks of this machine's CPU in about five minutes, and a report
	$(BIN)/nabla bench cpu --device cpu

bench-full: $(READY)  ## those, cost over tokens, and every real workload with fewer heads and frames
	for preset in $(PRESETS); do $(BIN)/nabla bench $$preset --device cpu || exit 1; done

bench-ci: $(READY)  ## what continuous integration keeps track of, by pytest-benchmark
	mkdir -p out
	$(BIN)/python -m pytest benchmarks/test_cpu.py --benchmark-json out/bench-ci.json

results: $(READY)  ## benchmarks/results/ anew, from a clean commit on a machine that does nothing else
	@git diff --quiet HEAD || { echo "results name a commit: commit the changes first"; exit 1; }
	for preset in $(PRESETS); do \
	  $(BIN)/nabla bench $$preset --device cpu --json out/results/$$preset.jsonl || exit 1; \
	done
	mkdir -p benchmarks/results && cp out/results/*.jsonl benchmarks/results/
	$(BIN)/python -m benchmarks.readme

readme: $(READY)  ## the tables of README.md from benchmarks/results/
	$(BIN)/python -m benchmarks.readme

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

# A static program needs none of the libraries of the other machine.
aarch64:  ## the tests of the CPU kernels on an ARM processor, emulated
	@for tool in cmake ninja aarch64-linux-gnu-g++ qemu-aarch64; do \
	  command -v $$tool > /dev/null || { echo "aarch64 needs $$tool; on Debian: apt-get install cmake ninja-build g++-aarch64-linux-gnu qemu-user"; exit 1; }; \
	done
	cmake -G Ninja -S . -B build/aarch64 -DNABLA_MODULE=test_cpu -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static
	cmake --build build/aarch64
	qemu-aarch64 build/aarch64/test_cpu

# A PYTHON that is named is taken; else the one in .venv, if it is there.
gpu-check: OUT ?= out/gpu-check
gpu-check:  ## on a machine with CUDA: build, tests, sanitizers, benchmark into OUT, no network
	$(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(BIN)/python),$(PYTHON)),$(PYTHON)) -m benchmarks.gpu_check $(OUT)
