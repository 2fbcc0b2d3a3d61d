# make demo    a Flux model split over two CPU processes, explained
# make test    linter, type checker, all tests
# make bench   side by side with diffusers' context parallelism; what compiling and hooks cost
# make bench-gpu   the exchange's kernels on a GPU
# make docs    the pages of docs/ as a site, in build/site
# make fuzz    N random programs against the simulator (make fuzz N=20000)

PYTHON ?= python3
VENV ?= .venv
# The build of torch decides what else is downloaded: pin it, or name another (TORCH=torch==2.14.0).
TORCH ?= torch==2.13.0
# Processes of pytest, and of the examples.
JOBS ?= 2
RANKS ?= 2
N ?= 1000
PYTEST_ARGS ?=

BIN := $(abspath $(VENV))/bin
TORCHRUN := OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node $(RANKS)
TYPES := build/types

.PHONY: demo stages test lint types format pytest bench bench-gpu docs fuzz clean

demo: $(VENV)/.models
	$(TORCHRUN) examples/flux_demo.py

stages: $(VENV)/.models
	$(TORCHRUN) examples/stages.py

bench: $(VENV)/.models
	$(TORCHRUN) examples/bench.py
	$(TORCHRUN) examples/bench_regional.py
	$(TORCHRUN) examples/bench_eager.py
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 4 examples/bench_attention.py
	$(TORCHRUN) examples/check_cost.py
	$(BIN)/python examples/compile_cost.py
	$(BIN)/python examples/bench_hooks.py

bench-gpu: $(VENV)/.torch
	@$(BIN)/python -c 'import fxsp' 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)" --editable .
	$(BIN)/python examples/bench_gpu.py

# Types are checked beside the first tests, which leave a core alone while they are collected.
test: lint
	@$(MAKE) --no-print-directory -j2 types pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy does not know package-dir mappings: lay the folders out as they are installed, by links.
types: $(VENV)/.test
	@rm -rf $(TYPES) && mkdir -p $(TYPES)/fxsp
	@ln -s $(CURDIR)/fxsp/* $(TYPES)/fxsp/ && ln -s $(CURDIR)/passes $(CURDIR)/kernels $(TYPES)/fxsp/
	cd $(TYPES) && $(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p fxsp

# The `pytest` command, not `python -m pytest`: the latter puts the top folder, with its `kernels`, on the path.
pytest: $(VENV)/.test
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile --durations=15 $(PYTEST_ARGS)

# Pages are Markdown, and nothing of ours is imported: an environment of its own, without torch.
docs: build/docs-venv/.docs
	NO_MKDOCS_2_WARNING=1 build/docs-venv/bin/mkdocs build --strict --quiet --site-dir build/site

fuzz: $(VENV)/.test
	OMP_NUM_THREADS=1 FXSP_FUZZ_PROGRAMS=$(N) $(BIN)/pytest tests/fuzz $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache

# Stamps, so that the second run starts at once.  torch goes first, alone: what is installed later finds its range met.
$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fxsp needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	@touch $@

$(VENV)/.models: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet "$(TORCH)" --editable ".[models]"
	@touch $@

build/docs-venv/.docs: pyproject.toml
	$(PYTHON) -m venv build/docs-venv
	build/docs-venv/bin/python -c 'import tomllib as t; f = open("pyproject.toml", "rb"); print(*t.load(f)["project"]["optional-dependencies"]["docs"], sep="\n")' > build/docs-venv/requirements.txt
	build/docs-venv/bin/python -m pip install --quiet --requirement build/docs-venv/requirements.txt
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet "$(TORCH)" --editable ".[test]"
	@touch $@ $(VENV)/.models
