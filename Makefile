# make demo, make test: a fresh machine needs Python 3.11 or newer with venv, make and a C++ compiler; no GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Two processes; a file's tests stay in one of them, and tests/selection.py has the slowest files first.
TOGETHER := -n 2 --dist loadfile --no-loadscope-reorder

CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-all test-processors test-transformers native sanitize check check-kernels check-kernels-all host \
	versions bench gpu tune docs clean

# Trains the bundled model on the bundled corpus and translates with it.
demo: native
	$(BIN)/tfm demo

test: native
	OMP_NUM_THREADS=1 $(BIN)/pytest $(TOGETHER)

# The long tests too, new examples of those that draw them, and what computes as on other processors.
test-all: native
	OMP_NUM_THREADS=1 TFM_EVERY=1 $(BIN)/pytest $(TOGETHER)
	$(MAKE) test-processors

# What computes, with fewer of this processor's instructions, setting by setting: some minutes each.
test-processors: native
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.processors -- $(TOGETHER)

# Hugging Face's models under the oldest transformers that is supported, in a folder of its own; `make test` has the newest.
OLDEST_TRANSFORMERS := 5.17.0
test-transformers: native
	grep -v '^transformers==' constraints.txt > $(VENV)/oldest.txt
	$(BIN)/pip install --quiet --upgrade --constraint $(VENV)/oldest.txt --target $(VENV)/oldest \
		transformers==$(OLDEST_TRANSFORMERS)
	PYTHONPATH=$(abspath $(VENV)/oldest) OMP_NUM_THREADS=1 $(BIN)/pytest $(TOGETHER) tests/huggingface

# The native operators: two seconds where nothing changed, one line where there is no compiler.
native: $(INSTALLED)
	$(BIN)/tfm build --if-possible

# Triton's kernels under the memory checker of its interpreter, and the CPU kernels under the address, undefined
# behaviour and thread sanitizers: minutes.
sanitize: $(INSTALLED)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m tools.sanitize.interpreter
	$(BIN)/python -m tools.sanitize.native

# Format, lint, types, and who may import whom.
check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_import_contract.py

# Compiles every kernel for sm_80, sm_90 (by both assemblers) and sm_100; fails on spills, on too much shared memory, on
# missing or serialised HGMMA and on hazards around it.
# Those of csrc too, for sm_80 and sm_90, where nvcc is.
check-kernels: $(INSTALLED)
	$(BIN)/python -m tools.check_kernels

# The full product of settings and chips, sm_86, sm_89 and sm_120 too.
check-kernels-all: $(INSTALLED)
	$(BIN)/python -m tools.check_kernels --every

# What the host does for every operation, without a GPU: launches, syncs, compilations and time, and what has changed
# since the committed record, which it renews. ONLY=encoder for some rows, which renew nothing.
host: $(INSTALLED)
	$(BIN)/python -m tools.host $(if $(ONLY),--only "$(ONLY)")

# The tests and check-kernels under each torch and triton, in environments of their own, an hour or more and gigabytes:
# ONLY=torch-2.12,triton-3.9 PARTS=tests AGAIN=1.
versions: $(INSTALLED)
	$(BIN)/python -m tools.versions $(if $(ONLY),--only $(ONLY)) $(if $(PARTS),--parts $(PARTS)) $(if $(AGAIN),--again)

# Each operation beside what people would use instead, as ratios in one run.
bench: native
	$(BIN)/python -m pytest benchmarks -o python_files='bench_*.py' --benchmark-enable -q --disable-warnings

# Everything on one NVIDIA GPU, in nine minutes: ONLY=attention,norm QUICK=1 DATA=dir OUT=file COMMIT=hash; or in two
# calls of five, CALL=proof and CALL=speed. Takes the python3 on PATH where there is no virtual environment.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m tools.gpu $(if $(ONLY),--only $(ONLY)) \
		$(if $(CALL),--call $(CALL)) $(if $(QUICK),--quick) $(if $(DATA),--data "$(DATA)") \
		$(if $(OUT),--out "$(OUT)")

# Launch settings and backends tried on a GPU, every family or FAMILY=norm: SECONDS=540 SIZE=8192x1024 DTYPE=fp16
# OUT=file.
tune:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m tools.tune $(or $(FAMILY),all) \
		$(if $(SECONDS),--seconds $(SECONDS)) $(if $(SIZE),--size "$(SIZE)") $(if $(DTYPE),--dtype $(DTYPE)) \
		$(if $(OUT),--out "$(OUT)")

# The site, in build/docs; a broken link or an unknown name fails it.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# torch comes first, pinned: every other package would pull the newest one.
$(INSTALLED): constraints.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch setuptools
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[translate,build,test,docs]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) build dist *.egg-info
