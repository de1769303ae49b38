# Each target does all of its own set-up on a fresh machine: a virtual environment, the pinned libraries, this package.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PYTEST_ARGS ?=
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: demo test test-lowest check lint fix proof clean

demo: $(READY)  ## quantize a trained language model to 4 bits, measure it, save it, load it back, generate text
	$(BIN)/python examples/quickstart.py

test: $(READY)  ## the test suite
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

# Old libraries warn about things that their later versions mended, so warnings are not errors here.
test-lowest:  ## the test suite with the oldest versions that pyproject.toml allows
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt PYTEST_ARGS="-W default"

# One process: two would write the same method's file. Claims of methods that are gone go with the folder.
proof: $(READY)  ## measure every claim anew, and write STATUS.md from what came out
	rm -rf proof/claims
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
