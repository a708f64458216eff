# make train           sets up .venv, trains configs/finch-tiny.yaml on real long documents
# make test            sets up .venv, runs the tests
# make help            lists the rest

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
INFCTX := $(VENV)/bin/infctx
TRAIN_CONFIG := $(or $(CONFIG),configs/finch-tiny.yaml)
TUNE_CONFIG := $(or $(CONFIG),configs/finch-tiny-tune-state.yaml)
RUNS ?= runs
TUNED = $(RUNS)/finch-tiny-tune
STATE ?=
MODEL ?= runs/finch-tiny
STORE ?= data/python/held_out
PROMPT ?= def
ARGS ?=
GPUS ?=
DEVICES = $(if $(GPUS),distributed.devices=$(GPUS))
BOOKS = $(if $(findstring data.store=,$(ARGS))$(findstring --rehearse,$(ARGS)),,$(if $(filter configs/%k.yaml,$(TRAIN_CONFIG)),data/pg19/store.json))
GPU_PYTHON = $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,$(PYTHON))
PIP_INSTALL := $(VENV)/bin/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt

# Passed through the environment, so that spaces and quotes in them survive.  INPUT and ARGS are lists of words.
export TRAIN_CONFIG TUNE_CONFIG MODEL STORE PROMPT OUTPUT STATE

.PHONY: help install prepare inspect train tune plan evaluate generate chat export bench showcase test test-slow lint dev gpu-check

help:  ## lists the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12
	@echo 'ARGS="..." passes options to a command, and settings to a run: make train ARGS="optimizer.steps=50"'

install: $(VENV)/installed  ## sets up .venv with everything the commands need

prepare: $(VENV)/installed  ## turns text into a token store: make prepare INPUT=books/ OUTPUT=data/books
	@test -n "$(INPUT)" -a -n "$${OUTPUT:-}" || { echo 'name INPUT and OUTPUT: make prepare INPUT=books/ OUTPUT=data/books' >&2; exit 2; }
	@$(INFCTX) prepare $(INPUT) --output "$$OUTPUT" $(ARGS)

inspect: $(VENV)/installed  ## shows what is in a token store: make inspect STORE=data/books/train ARGS="--document 0"
	@$(INFCTX) inspect "$$STORE" $(ARGS)

train: $(VENV)/installed $(if $(filter configs/%-tiny.yaml,$(TRAIN_CONFIG)),data/python/store.json) $(BOOKS)  ## trains CONFIG=configs/finch-tiny.yaml on GPUS=1, or resumes it
	@$(INFCTX) train "$$TRAIN_CONFIG" $(DEVICES) $(ARGS)

tune: $(VENV)/installed $(if $(filter configs/finch-tiny-tune-%.yaml,$(TUNE_CONFIG)),data/cpp/store.json runs/finch-tiny/model.pth)  ## tunes a state, an adapter and both on finch-tiny, and compares them; or CONFIG=..., GPUS=1
ifeq ($(CONFIG),)
	@$(INFCTX) tune configs/finch-tiny-tune-state.yaml run.folder="$(TUNED)-state" $(DEVICES) $(ARGS)
	@$(INFCTX) tune configs/finch-tiny-tune-adapter.yaml run.folder="$(TUNED)-adapter" $(DEVICES) $(ARGS)
	@$(INFCTX) tune configs/finch-tiny-tune-adapter.yaml model.adapter.initial_state=true run.folder="$(TUNED)-both" $(DEVICES) $(ARGS)
	@$(VENV)/bin/python tools/compare_tuning.py "$(TUNED)-state" "$(TUNED)-adapter" "$(TUNED)-both"
else
	@$(INFCTX) tune "$$TUNE_CONFIG" $(DEVICES) $(ARGS)
endif

plan: $(VENV)/installed  ## shows the memory that a run needs: CONFIG=..., GPUS=8, ARGS="window.lanes=8 --device-gb 80"
	@$(INFCTX) plan "$$TRAIN_CONFIG" $(DEVICES) $(ARGS)

evaluate: $(VENV)/installed  ## loss by position: make evaluate MODEL=runs/finch-tiny STORE=data/python/held_out
	@$(INFCTX) evaluate "$$MODEL" "$$STORE" $(ARGS)

generate: $(VENV)/installed  ## continues a prompt: make generate MODEL=runs/finch-tiny PROMPT='def '
	@$(INFCTX) generate "$$MODEL" $${STATE:+--state "$$STATE"} --prompt "$$PROMPT" $(ARGS)

chat: $(VENV)/installed  ## chats with a model: make chat MODEL=model.pth STATE=runs/mine
	@$(INFCTX) chat "$$MODEL" $${STATE:+--state "$$STATE"} $(ARGS)

export: $(VENV)/installed  ## writes weights or a state for other programs: make export MODEL=runs/finch-tiny OUTPUT=finch-tiny.pth
	@test -n "$${OUTPUT:-}" || { echo 'name OUTPUT: make export OUTPUT=finch-tiny.pth' >&2; exit 2; }
	@$(INFCTX) export "$$MODEL" "$$OUTPUT" $(ARGS)

bench: $(VENV)/installed  ## speed and memory of training here: make bench ARGS="--version 7 --against HEAD~1"
	@$(INFCTX) bench $(ARGS)

showcase: $(VENV)/installed  ## trains one tiny model three ways to recall a fact, in minutes, and shows which one can
	@$(VENV)/bin/python tools/showcase.py $(ARGS)

test: $(VENV)/installed-test  ## runs the tests, in minutes
	@$(VENV)/bin/python -m pytest -n 4 $(ARGS)

test-slow: $(VENV)/installed-test  ## runs the tests that `make test` leaves out: long windows, many ranks
	@$(VENV)/bin/python -m pytest -n 4 -m 'slow and not gpu' $(ARGS)

lint: $(VENV)/installed-test  ## checks style, formatting, types, sizes of files and functions, words
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/python tools/check_size.py
	@$(VENV)/bin/python tools/check_words.py

dev: $(VENV)/installed-test  ## sets up for contributors: everything the tests need, and `make lint` before each commit
	@$(PIP_INSTALL) --editable '.[dev]'
	@$(VENV)/bin/pre-commit install
	@echo 'Ready. Read docs/architecture.md, then infctx/train/loop.py; make test takes minutes, make lint a moment.'

# Uses the torch that is already there; installs nothing.
gpu-check:  ## checks and times the kernels on a GPU, in minutes: make gpu-check ARGS="--output table.md"
	@$(GPU_PYTHON) -c 'import sys; from importlib.util import find_spec; sys.exit(0 if find_spec("torch") else f"gpu-check needs torch, which {sys.executable} does not have; name another: make gpu-check PYTHON=python3.11")'
	@$(GPU_PYTHON) tools/gpu/gpu_check.py $(ARGS)

$(VENV)/installed: pyproject.toml constraints.txt
	@echo 'Setting up $(VENV); this takes a minute or two ...'
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info[:2] <= (3, 13) else f"infctx needs Python 3.10 to 3.13; {sys.executable} is {sys.version.split()[0]}. Name another: make PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) torch
	@$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	@$(PIP_INSTALL) --editable '.[test]'
	@touch $@

# The documents of the default runs: the Python installation's own long sources, and the C++ headers of torch.
data/python/store.json data/cpp/store.json: data/%/store.json: tools/example_documents.py | $(VENV)/installed
	@$(VENV)/bin/python tools/example_documents.py $* | $(INFCTX) prepare - --format jsonl --tokenizer bytes --held-out 0.1 --output data/$* --overwrite

# Long documents for the published models: 2,000 books of PG-19, a copy of it in parquet on the Hugging Face Hub.
data/pg19/store.json: | $(VENV)/installed
	@$(INFCTX) prepare hf:emozilla/pg19 --split train --limit 2000 --held-out 0.02 --output data/pg19

runs/finch-tiny/model.pth: | $(VENV)/installed data/python/store.json
	@echo 'Training the model first: make train'
	@$(INFCTX) train configs/finch-tiny.yaml
