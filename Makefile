# Everything a person does with this repository. `make help` lists it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
MODEL ?= gpt_oss
BUILD := $(PYTHON) build.py
.DEFAULT_GOAL := help

VARIANT ?= cpu

.PHONY: help setup lock demo test lint engine image engine-stop test-image

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
	@.venv/bin/shellcheck .ci/run tests/image/run tests/image/*/run.sh images/root/usr/local/bin/slipway-entrypoint
	@.venv/bin/hadolint images/Dockerfile

engine:  ## a Docker engine: the one that answers, else a private one (Debian, as root)
	@$(BUILD) engine

image:  ## an image: MODEL=gpt_oss VARIANT=cpu
	@$(BUILD) image --model $(MODEL) --variant $(VARIANT)

test-image: engine image  ## build the image and run the tests of it
	@PYTHON=$(PYTHON) IMAGE=slipway/$(MODEL):$(VARIANT) tests/image/run

engine-stop:  ## stop the private engine; what it built is kept
	@$(BUILD) engine-stop
