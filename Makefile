# Every target builds what it needs: Python 3.11 or newer, make and a package registry are enough.

PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONDONTWRITEBYTECODE  # tests start many processes, each of which would compile the package once more

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := test
.PHONY: demo test real fuzz coverage floor wheel check fmt bench clean

demo: $(STAMP)  ## compress the bundled model to 4 bits and let the result write something
	@$(BIN)/compress run gptq-w4 demo -o demo-out --overwrite
	@$(BIN)/python -m compress.demo.speak demo-out
	@echo "next: . $(BIN)/activate; compress quantize MODEL --bits 4"

test: $(STAMP)  ## run the tests in two processes; `make test ARGS="-k gptq"` passes arguments to pytest
	@$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

real: $(STAMP)  ## the tests that need a real model, another engine or minutes
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m real $(ARGS)

fuzz: $(STAMP)  ## damage every file that is read, 5,000 times; `make fuzz ARGS="--seed 7 --cases 300"`
	@OMP_NUM_THREADS=1 $(BIN)/python tests/hostile/fuzz.py $(ARGS)

coverage: $(STAMP)  ## the tests, and at the end how many lines of the package they run
	@$(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term:skip-covered $(ARGS)

floor: $(STAMP)  ## a few tests with the oldest transformers that pyproject.toml accepts
	@PYTHON=$(BIN)/python bash scripts/try_floor.sh $(ARGS)

wheel: $(STAMP)  ## build the wheel, install it into an empty environment and use it there
	@PYTHON=$(BIN)/python bash scripts/try_wheel.sh

check: $(STAMP)  ## lint, formatting, types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@# Side by side, with a cache each: their options differ, so neither could use the other's.
	@$(BIN)/mypy --strict -p compress & package=$$!; \
	$(BIN)/mypy --config-file tests/mypy.ini --cache-dir .mypy_cache/tests tests; tests=$$?; \
	wait $$package && exit $$tests

fmt: $(STAMP)  ## sort imports, apply safe fixes, format
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

bench: $(STAMP)  ## run the benchmarks
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash benchmarks/run.sh

clean:  ## remove everything generated except .venv
	@rm -rf build dist *.egg-info demo-out .mypy_cache .pytest_cache .ruff_cache
	@find . -path ./$(VENV) -prune -o -path ./.git -prune -o -type d -name __pycache__ -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing torch"
	@$(BIN)/python -m pip install -q -c constraints.txt torch
	@echo "installing compress and the development tools"
	@$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	@touch $@
