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
WORKERS ?= 3
OVERLAY ?= small
BENTO ?= longtrail-bento:latest

# Of the images: `make images TAG=1.4`, `make push REGISTRY=… TAG=1.4`, IMAGES="data spark train" with Spark's; pip's variables name a mirror, or an index of CPU-only wheels of torch.
DOCKER ?= docker
TAG ?= $(shell git describe --always --dirty 2>/dev/null || echo latest)
IMAGES ?= data train $(if $(wildcard build/bento/bento.yaml),bento)
BUILD_ARGS = $(foreach name,BASE TRAIN_BASE PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS,$(if $($(name)),--build-arg $(name)))
export BASE TRAIN_BASE PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS

.PHONY: help run test serve pipeline images push test-images manifests setup lint clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

run: $(VENV)/.ready ## raw log -> validated -> features -> trained -> evaluated -> A/B-tested -> packaged
	@python -m pipelines.local

test: $(VENV)/.ready $(VENV)/.test-tools ## all tests
	@python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

serve: $(VENV)/.ready ## the packaged service on loopback
	@python -m serving.run --bento build/bento --port $(PORT)

pipeline: $(VENV)/.ready ## the Kubeflow pipeline, compiled
	@python -m pipelines.kubeflow --params params.yaml --out build/pipeline.yaml

images: ## container images: data, train, and bento where build/bento is (TAG=… IMAGES=…)
	@for image in $(IMAGES); do \
		$(DOCKER) build $(BUILD_FLAGS) --target $$image -t longtrail-$$image:$(TAG) $(BUILD_ARGS) \
			--build-arg GIT_COMMIT=$$(git describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null || echo unknown) . || exit 1; \
	done

push: ## the images to a registry (REGISTRY=… TAG=…)
	@test -n "$(REGISTRY)" || { echo "make push needs REGISTRY=…, e.g. REGISTRY=registry.example.com/shop" >&2; exit 2; }
	@for image in $(IMAGES); do \
		$(DOCKER) tag longtrail-$$image:$(TAG) $(REGISTRY)/longtrail-$$image:$(TAG) && $(DOCKER) push $(REGISTRY)/longtrail-$$image:$(TAG) || exit 1; \
	done

test-images: $(VENV)/.ready ## build the images and run the pipeline in them (minutes; skipped, with the reason, where no engine starts)
	@docker info >/dev/null 2>&1 || { command -v dockerd && command -v mmdebstrap; } >/dev/null || test "$$(id -u)" != 0 \
		|| sh tools/apt.sh docker.io mmdebstrap || echo "docker.io and mmdebstrap are not here: the images will not be tested"
	@command -v docker-registry >/dev/null || test "$$(id -u)" != 0 || sh tools/apt.sh docker-registry || echo "docker-registry is not here: make push will not be tested"
	@LONGTRAIL_TEST_IMAGES=1 python -m pytest tests/images --timeout=1400 -ra

manifests: ## what `kubectl apply -k deploy/overlays/OVERLAY` would apply (OVERLAY=small; BENTO=the service's image)
	@build="kustomize build"; command -v kustomize >/dev/null || build="kubectl kustomize"; \
	built=$$($$build deploy/overlays/$(OVERLAY)) && printf '%s\n' "$$built" | sed 's|image: longtrail-bento:latest$$|image: $(BENTO)|'

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
	@! command -v java >/dev/null || $(BIN)/python -c 'import pyspark' 2>/dev/null || { echo "Installing pyspark, for its tests (once) ..."; \
		$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["spark"], sep="\n")' \
		| $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r /dev/stdin; } || echo "pyspark cannot be had: its tests will be skipped"
	@touch $@
