# Everything a person does with this repository. `make help` lists it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
MODEL ?= gpt_oss
BUILD := $(PYTHON) build.py
.DEFAULT_GOAL := help

.PHONY: help setup lock demo test lint

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

setup:  ## install what uv.lock names into .venv (instant when nothing changed)
	@$(BUILD) setup

lock:  ## resolve the dependencies anew and write uv.lock
	@$(BUILD) lock

demo: setup  ## the whole flow on a tiny model: no GPU, no container engine
	@.venv/bin/slipway demo --model $(MODEL)

test: setup lint  ## unit and integration tests
	@.venv/bin/pytest tests --ignore tests/image

lint: setup
	@.venv/bin/ruff check --quiet .
	@.venv/bin/ruff format --quiet --check .
