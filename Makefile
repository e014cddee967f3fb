# Every target makes the environment it needs; a second call does not install again.
# Another interpreter:  make test PYTHON=python3.12      Only some tests:  make test TESTS="-k report"

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
TESTS ?= -n 2
VENV := .venv
RUN := $(VENV)/bin/python -m
READY := $(VENV)/.ready

# DVC starts its stages with $SHELL; with bash a stage dies together with the run that started it.
export SHELL
# Nothing here reports home.
export DO_NOT_TRACK := 1
export DVC_NO_ANALYTICS := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false

.PHONY: help demo full test lint bench

help:  ## show this list
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(READY)  ## the whole pipeline on the lab models, small budgets; prints the table and the report
	$(RUN) flows run

full: $(READY)  ## the same with the full budgets
	$(RUN) flows run --profile full

test: lint  ## everything that CI checks
	@scripts/chromium.sh
	$(RUN) pytest $(TESTS)

lint: $(READY)  ## the checks that run nothing: ruff, mypy, import-linter
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy
	$(VENV)/bin/lint-imports

bench: $(READY)  ## speed as ratios, each against a baseline in the same run
	$(RUN) benchmarks

$(READY): pyproject.toml constraints.txt scripts/environment.sh
	@scripts/environment.sh "$(PYTHON)" $(VENV) $(READY)
