# One line per target; `make help` lists them. Targets set up .venv by themselves on a fresh machine;
# gpu targets run from the source tree with the machine's own torch and triton, and install nothing.

PYTHON     ?= python3
GPU_PYTHON ?= python3
BIN        := .venv/bin
READY      := .venv/.ready
OLDEST     := .cache/triton-3.6.0
TESTS      := --doctest-modules tests vertebra/kernels vertebra/nn vertebra/models vertebra/_explain.py
A_PART     := --typed sm_90 --sampled sm_80 sm_89 sm_100 gfx942

.DEFAULT_GOAL := help
.PHONY: help bench microbench test test-all check aot aot-all gpu report docs clean

help:  ## list the targets
	@sed -n 's/^\([a-z%-]*\):.*## /\1\t/p' Makefile | expand -t 46

bench: $(READY)  ## check every answer, then measure: eager, torch.compile, vertebra
	$(BIN)/python -m vertebra bench

microbench: $(READY)  ## the ops by pytest-benchmark, saved; ARGS=--benchmark-compare beside the last
	TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/bench/test_microbench.py --benchmark-only \
		--benchmark-autosave --benchmark-storage=.benchmarks --benchmark-columns=min,median,iqr,rounds $(ARGS)

test: aot  ## the kernels' compile gate, then the tests and the examples in docstrings
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not thorough" --hypothesis-profile=ci $(TESTS)

test-all: aot-all  ## the same with nothing left out: slow
	$(BIN)/python -m pytest -n auto --dist worksteal $(TESTS)

check: $(READY)  ## lint, format, types, and the bans of .pre-commit-config.yaml
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	SKIP=ruff,ruff-format,pyright $(BIN)/pre-commit run --all-files

aot: $(READY) $(OLDEST)/.ready  ## compile every kernel: for sm_90 each type, a sample elsewhere and on the oldest triton
	$(BIN)/python -m vertebra.testing.aot $(A_PART)
	PYTHONPATH=$(OLDEST) $(BIN)/python -m vertebra.testing.aot --targets sm_90 gfx942 --sampled sm_90 gfx942

aot-all: $(READY) $(OLDEST)/.ready  ## every binary of every target on both tritons: slow, for a change to kernels
	$(BIN)/python -m vertebra.testing.aot --configurations sm_90
	PYTHONPATH=$(OLDEST) $(BIN)/python -m vertebra.testing.aot --configurations sm_90

gpu:  ## test and measure on this machine's GPU; results go to $OUT, else bench/results
	PYTHONPATH=.:$$PYTHONPATH $(GPU_PYTHON) -m vertebra.bench.gpu

gpu-%:  ## one stage of it, at most 8 minutes: test, kernels, models, train, compile or tune
	PYTHONPATH=.:$$PYTHONPATH $(GPU_PYTHON) -m vertebra.bench.gpu --stage $*

report: $(READY)  ## write tables and charts of README and docs from committed results
	$(BIN)/python -m vertebra report

docs: $(READY)  ## build the documentation into site/
	$(BIN)/mkdocs build --strict

clean:  ## remove everything the targets made, except bench/results
	rm -rf .venv .cache .pytest_cache .ruff_cache .benchmarks .hypothesis site dist build

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

$(OLDEST)/.ready: | $(READY)
	$(BIN)/pip install -q --no-deps --upgrade --target $(OLDEST) triton==3.6.0
	@touch $@
