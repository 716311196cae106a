# make demo, make test: a fresh machine needs Python 3.11 or newer with venv, make and a C++ compiler; no GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check check-kernels bench clean

# Trains the bundled model on the bundled corpus and translates with it.
demo: $(INSTALLED)
	$(BIN)/tfm demo

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup

# Format, lint, types, and who may import whom.
check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_import_contract.py

# Compiles every kernel for sm_80, sm_90 and sm_100; fails on a spill or on too much shared memory.
check-kernels: $(INSTALLED)
	$(BIN)/python -m benchmarks.check_kernels

# Each operation beside what people would use instead, as ratios in one run.
bench: $(INSTALLED)
	$(BIN)/python -m pytest benchmarks -o python_files='bench_*.py' --benchmark-enable --benchmark-group-by=group

# torch comes first, pinned: every other package would pull the newest one.
$(INSTALLED): constraints.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch setuptools
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[test]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) build dist *.egg-info
