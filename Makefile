# Needs: make, git, and Python 3.11, 3.12 or 3.13 with its venv module. No compiler, no root, no GPU.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON ?=
TORCH ?=
BUNDLE ?=
SIZE ?= sd15
BIN := .venv/bin
INSTALLED := .venv/installed
DOWNLOADER := .venv-img2dataset/installed

.PHONY: help setup downloader web demo test quick check lint format bench gpu-check clean

help: ## list these targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: $(INSTALLED) ## make .venv and install everything into it (3.5 GB to download, once)

downloader: $(DOWNLOADER) ## make the environment of img2dataset (190 MB to download, once), which has pins of its own

web: ## fetch onnxruntime-web by npm, for a bundle's page (once); BUNDLE=DIR copies it into a bundle, too
	@infra/web/setup.sh $(BUNDLE)

demo: setup ## run recipe mini, from shards to a student and its phone bundle, into runs/demo
	@$(BIN)/python -m jobs.run_pipeline --recipe mini --out runs/demo

test: setup downloader ## run the tests, three files at a time: on two cores one is always waiting for a process
	@$(BIN)/pytest -m "not slow" -n 3 --dist loadfile --no-loadscope-reorder

quick: setup ## the tests that need no Ray and end within seconds, in two minutes
	@$(BIN)/pytest -m "not slow" --quick -n 2 --dist loadfile

check: lint test ## the one gate: format, lint, types, tests

lint: setup ## format, lint and types only
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: setup ## rewrite the code in the house's format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: setup ## measurements and long tests (marked slow), tens of minutes
	@$(BIN)/pytest -m slow --capture=no

gpu-check: setup ## check one CUDA device in five minutes (docs/gpu.md); SIZE=mini does the same on the CPU
	@$(BIN)/python -m jobs.gpu_check --size $(SIZE)

clean: ## delete the environment and the caches; runs/ is kept
	@rm -rf .venv .venv-img2dataset *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml infra/constraints.txt infra/setup.sh
	@PYTHON="$(PYTHON)" TORCH="$(TORCH)" infra/setup.sh
	@touch $@

$(DOWNLOADER): infra/img2dataset/requirements.txt infra/img2dataset/setup.sh
	@PYTHON="$(PYTHON)" infra/img2dataset/setup.sh
	@touch $@
