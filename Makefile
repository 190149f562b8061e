# Every target sets up what it needs: `make demo` and `make test` work in a fresh clone.
.DEFAULT_GOAL := help
.PHONY: help test lint types demo bench fuse-bench sharded-bench gpu-bench precision-bench plan-bench memory-bench long-bench long-exact-bench pipe-bench assign-bench megatron-bench pins-bench clean

PYTHON3 ?= python3
PYTHON := .venv/bin/python
INSTALLED := .venv/.installed

# One thread per process: the tests and the demo start several processes on a few cores.
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false

help: ## show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

test: $(INSTALLED) ## run all tests (two workers, an hour at most)
	timeout 3600 $(PYTHON) -m pytest -q -n 2 --dist loadgroup

lint: $(INSTALLED) ## check the format and the code with ruff
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .

types: $(INSTALLED) ## check the types with mypy --strict
	$(PYTHON) -m mypy

demo: $(INSTALLED) ## train a small GPT-2 in 4 processes next to a single-process copy
	$(PYTHON) examples/train_gpt2.py

bench: $(INSTALLED) ## time what autopar emits against plain and hand-written programs
	$(PYTHON) -m tests.benchmarks.speed

fuse-bench: $(INSTALLED) ## time programs with fuse=True against torch.compile
	$(PYTHON) -m tests.benchmarks.fusion

sharded-bench: $(INSTALLED) ## time and weigh ZeRO plans against FSDP2 and DDP with a ZeRO optimizer
	$(PYTHON) -m tests.benchmarks.sharded

gpu-bench: $(INSTALLED) ## check, time and weigh one-rank plans on this machine's GPU (eight minutes)
	$(PYTHON) -m tests.benchmarks.gpu -o gpu.md

precision-bench: $(INSTALLED) ## compare steps of parallel programs in each precision with those of one device
	$(PYTHON) -m tests.benchmarks.precision

plan-bench: $(INSTALLED) ## time the planner on large models
	$(PYTHON) -m tests.benchmarks.planning

memory-bench: $(INSTALLED) ## predicted and allocated peaks of memory, 53 plans (five minutes)
	$(PYTHON) -m tests.benchmarks.memory

long-exact-bench: $(INSTALLED) ## check attention on split sequences: kinds, masks, heads (ten minutes)
	$(PYTHON) -m tests.benchmarks.long_exactness

pipe-bench: $(INSTALLED) ## time the pipeline executor against torch's own runtime
	$(PYTHON) -m tests.benchmarks.pipelines

assign-bench: $(INSTALLED) ## time the search for stages
	$(PYTHON) -m tests.benchmarks.assignment

megatron-bench: $(INSTALLED) ## predict the steps of Megatron-LM's table, pinned and free
	$(PYTHON) -m tests.benchmarks.megatron

long-bench: $(INSTALLED) ## memory, work, overlap and bytes of long sequences, and rings against torch's (fifteen minutes)
	$(PYTHON) -m tests.benchmarks.long_sequences
	$(PYTHON) -m tests.benchmarks.ring

pins-bench: $(INSTALLED) ## draw pins at random: the free plan must not lose to them (hours; --share draws a part)
	$(PYTHON) -m tests.benchmarks.pins

clean: ## remove build products and caches, keep .venv
	rm -rf build dist *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache
	find autopar cost_models examples tests -name __pycache__ -prune -exec rm -rf {} +

# torch goes first and alone: its exact version decides the rest, and a resolver that starts from `-e .[dev]` may fetch
# several builds of it before it settles.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(PYTHON) || $(PYTHON3) -m venv .venv
	$(PYTHON) -m pip install --quiet --upgrade pip
	$(PYTHON) -m pip install --quiet -c constraints.txt torch==2.13.0
	$(PYTHON) -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@
