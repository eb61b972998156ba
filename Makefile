# Everything runs on a fresh clone with only Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test quick check install clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Two processes of one thread each: more would only wait for one another.
test quick check: export OMP_NUM_THREADS = 1

demo: install
	$(BIN)/vicinal demo out=demo

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile tests

quick: install
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow' tests

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --dist loadfile --jaxtyping-packages=vicinal,beartype.beartype tests
	$(BIN)/python -m pytest --doctest-modules --doctest-continue-on-failure src

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
