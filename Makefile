# Everything a person does with this repository. `make help` lists it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
MODEL ?= gpt_oss
BUILD := $(PYTHON) build.py
.DEFAULT_GOAL := help

VARIANT ?= full
# Sources from elsewhere than their pins say: SOURCES="--source nemo=CLONE --context te=docker-image://NAME"
SOURCES ?=
# The processor: linux/amd64 or linux/arm64; that of this machine unless it is said.
PLATFORM ?=
OF = --model $(MODEL) --variant $(VARIANT) $(if $(PLATFORM),--platform $(PLATFORM))

.PHONY: help setup transformers5 lock audit demo docs test test-slurm slurm-slow lint engine image images engine-stop test-image test-image-slow test-image-gpu verify size sbom push archive sqsh

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

setup:  ## install what uv.lock names into .venv (instant when nothing changed)
	@$(BUILD) setup

transformers5: setup  ## the newest major of transformers, for the tests that compare with it
	@$(BUILD) transformers5

lock:  ## resolve the dependencies again and write uv.lock
	@$(BUILD) lock

audit: setup  ## known vulnerabilities of Python packages, updates of Debian packages (needs a network; says so where there is none)
	@$(BUILD) audit

demo: setup  ## the whole flow on a tiny model: no GPU, no container engine
	@.venv/bin/slipway demo --model $(MODEL)

test: setup transformers5 lint  ## unit and integration tests; those on a Slurm and on images have targets of their own
	@.venv/bin/pytest tests --ignore tests/image --ignore tests/slurm --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-slurm: setup  ## `submit` and the commands on a real Slurm of their own (as root; installs Debian's packages)
	@SLIPWAY_TESTS_NEED_SLURM=1 .venv/bin/pytest tests/slurm --numprocesses 3 --dist loadfile

slurm-slow: setup  ## 100 random faults on real Slurms, and NeMo-Run on the same cluster: tables for docs/launching.md
	@.venv/bin/python tests/slurm/faults.py
	@.venv/bin/python tests/slurm/against_nemo_run.py

docs: setup  ## fill the tables of docs/ and the comments of the recipes from the code
	@.venv/bin/python docs/tables.py

lint: setup  ## style, types, shell, Dockerfile, and tables of docs/ (no network needed)
	@.venv/bin/ruff check --quiet .
	@.venv/bin/ruff format --quiet --check .
	@.venv/bin/mypy --no-error-summary
	@.venv/bin/python docs/tables.py --check
	@.venv/bin/shellcheck --shell=bash .ci/run tests/image/run tests/image/*/run.sh tests/image-slow/*/run.sh tests/image-gpu/*/run.sh deploy/*.sbatch images/compile/one-job images/root/usr/local/bin/slipway-entrypoint entrypoints/slipway/cluster/remote.sh tests/slurm/stand-in
	@.venv/bin/hadolint images/Dockerfile

engine:  ## a Docker engine: the one that answers, else a private one (Debian, as root)
	@$(BUILD) engine

image:  ## an image: MODEL=gpt_oss VARIANT=full, index or cpu
	@$(BUILD) image $(OF) $(SOURCES)

images:  ## every family's image
	@$(BUILD) images --variant $(VARIANT) $(if $(PLATFORM),--platform $(PLATFORM)) $(SOURCES)

verify:  ## build an image twice without cache and compare the digests
	@$(BUILD) verify $(OF) $(SOURCES)

size:  ## what the layers of an image hold
	@$(BUILD) size $(OF)

sbom:  ## an image's bill of materials
	@$(BUILD) sbom $(OF)

push:  ## an image into a registry: TO=HOST/NAME:TAG
	@$(BUILD) push $(OF) --to $(TO) $(SOURCES)

archive: OUT ?= slipway_$(MODEL).tar
archive:  ## an image as one OCI archive: OUT=FILE
	@$(BUILD) archive $(OF) --out $(OUT) $(SOURCES)

sqsh: OUT ?= slipway_$(MODEL).sqsh
sqsh:  ## an image as a squashfs for enroot and pyxis: OUT=FILE
	@$(BUILD) sqsh $(OF) --out $(OUT)

# No git host is needed to test.
test-image test-image-slow: VARIANT = cpu

test-image: engine image  ## build the image and run the tests of it
	@PYTHON=$(PYTHON) SOURCES="$(SOURCES)" IMAGE=slipway/$(MODEL):$(VARIANT) tests/image/run

test-image-slow: engine image  ## the tests that build again: times of rebuilds, squashfs, digests of two builds
	@PYTHON=$(PYTHON) SOURCES="$(SOURCES)" IMAGE=slipway/$(MODEL):$(VARIANT) TESTS=tests/image-slow tests/image/run
	@$(BUILD) verify $(OF)

test-image-gpu: image  ## the tests of the full image that need a GPU, and an engine that gives it to a container
	@PYTHON=$(PYTHON) SOURCES="$(SOURCES)" IMAGE=slipway/$(MODEL):$(VARIANT) TESTS=tests/image-gpu tests/image/run

engine-stop:  ## stop the private engine; what it built is kept
	@$(BUILD) engine-stop
