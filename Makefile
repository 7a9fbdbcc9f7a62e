# Everything a user runs. Each target sets up what it needs first: a fresh Debian or Ubuntu with Python 3.11, git and make is enough.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export BENTOML_DO_NOT_TRACK := True
export DVC_NO_ANALYTICS := 1
export FEAST_USAGE := False
export PYTHONWARNINGS := ignore
# Set on the command line, e.g. `make serve PORT=8080`.
PORT ?= 3000
WORKERS ?= 2

.PHONY: help run test serve pipeline setup lint clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

run: $(VENV)/.ready ## raw log -> validated -> features -> trained -> evaluated -> A/B-tested -> packaged
	@python -m pipelines.local

test: $(VENV)/.ready $(VENV)/.test-tools ## all tests
	@python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

serve: $(VENV)/.ready ## the packaged service on loopback
	@python -m serving.run --bento build/bento --port $(PORT)

pipeline: $(VENV)/.ready ## the Kubeflow pipeline, compiled
	@python -m pipelines.kubeflow --params params.yaml --out build/pipeline.yaml

setup: $(VENV)/.ready ## the Python environment alone

lint: $(VENV)/.ready ## ruff and mypy
	@ruff check . && ruff format --check . && mypy

clean: ## remove all outputs; the environment and downloaded data stay
	rm -rf build var

$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info < (3, 13); sys.exit(None if ok else f"Longtrail needs Python 3.11 or 3.12, this is {sys.version.split()[0]}: set PYTHON=")'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || sh tools/apt.sh python3-venv
	@command -v git >/dev/null || sh tools/apt.sh git
	@echo "Setting up $(VENV) (a few minutes, once) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.test-tools: $(VENV)/.ready
	@command -v redis-server >/dev/null || sh tools/apt.sh redis-server || echo "redis-server is not here: its tests will be skipped"
	@touch $@
