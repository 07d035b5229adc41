# Python 3.11 or newer is all that is needed: every target creates .venv and installs into it first, once.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
EXTRAS ?= text,train,dev
# Two processes keep two cores busy: the models of the tests are too small for torch to use more than one.
WORKERS ?= 2
BIN := .venv/bin
OUT ?= runs/quickstart

.PHONY: install quickstart test lint types tests docs readme pocket bench shootout format clean

install: .venv/.installed

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "trimtab needs Python 3.11 or newer (none found; make PYTHON=/path/to/python)" >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

.venv/.installed-docs: .venv/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	@touch $@

quickstart: install
	$(BIN)/trimtab quickstart --out $(OUT)

test: lint types tests

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

tests: install
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

readme: install
	$(BIN)/python docs/outputs.py --all

pocket: install
	$(BIN)/python -m trimtab.pocket.train

bench: install
	@for script in $(filter-out benchmarks/shootout%,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

# Every test-time method at three budgets on two models; resumes where it stopped.
shootout: install
	$(BIN)/python benchmarks/shootout.py
	$(BIN)/python benchmarks/shootout_report.py

clean:
	rm -rf .mypy_cache .ruff_cache .pytest_cache site dist build
