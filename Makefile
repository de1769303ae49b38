# Each target does all of its own set-up on a fresh machine: a virtual environment, the pinned libraries, this package.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PYTEST_ARGS ?=
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: demo test test-lowest check lint fix proof bench-gpu sanitize-gpu clean

demo: $(READY)  ## quantize a trained language model to 4 bits, measure it, save it, load it back, generate text
	$(BIN)/python examples/quickstart.py

# Each worker computes in one thread: no sum depends on how many there are, and none waits for the other's cores.
WORKERS ?= 2
test: $(READY)  ## the test suite, in WORKERS processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --durations 12 $(PYTEST_ARGS)

# Old libraries warn about things that their later versions mended, so warnings are not errors here.
test-lowest:  ## the test suite with the oldest versions that pyproject.toml allows
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt PYTEST_ARGS="-W default"

# One process: two would write the same method's file. Stopped, it goes on where it was.
proof: $(READY)  ## measure the claims that are missing or older than their method's source (ANEW=1: all), write STATUS.md
	$(if $(ANEW),rm -rf proof/claims)
	$(BIN)/python -m pytest -q -m "not gpu and not hub" --claims proof/claims $(PYTEST_ARGS) plugins
	$(BIN)/python -m hf_quant.testing.status

check: lint test  ## what CI runs: format, lint, types, tests

lint: $(READY) build/typing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(READY)  ## format, and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# On a machine that has its own libraries and no network: make bench-gpu BENCH_PYTHON=python3
BENCH_PYTHON ?=
BENCH = PYTHONPATH=. $(or $(BENCH_PYTHON),$(BIN)/python)
BENCH_READY = $(if $(BENCH_PYTHON),,$(READY))

bench-gpu: $(BENCH_READY)  ## on a GPU, within 8 minutes: the tests marked gpu, then all benchmarks, as JSON in kernels/bench/results
	$(BENCH) kernels/bench/run.py

sanitize-gpu: $(BENCH_READY)  ## on a GPU: kernel tests under compute-sanitizer, where it is installed (memory, then races)
	@command -v compute-sanitizer > /dev/null || { echo "compute-sanitizer is not installed"; exit 1; }
	$(foreach tool,memcheck racecheck,PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=. compute-sanitizer --tool $(tool) --error-exitcode 1 \
		$(or $(BENCH_PYTHON),$(BIN)/python) -m pytest -q -m gpu kernels/_gemm/gpu_test.py -k "one_hot or float8" &&) true

# The stamp is written last, so an interrupted set-up starts again; a later call with nothing changed costs nothing.
$(READY): pyproject.toml setup.py $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e ".[dev,all]"
	touch $@

# mypy sees plugins/ and kernels/ where an installed package has them.
build/typing:
	mkdir -p $@/hf_quant
	ln -sfn ../../../plugins $@/hf_quant/plugins
	ln -sfn ../../../kernels $@/hf_quant/kernels

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
