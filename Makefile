# All targets run in .venv, with the versions pinned in requirements.txt.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all test-slow check bench bench-peers torture lock install clean package sbom

VENDOR ?= kling
demo: .venv/demo  ## the whole pipeline, offline; VENDOR=novita, highway, aihubmax or oxen for another vendor's stand-in
	$(BIN)/kling-relay demo --vendor $(VENDOR)

# Most tests wait for sockets and other processes more than they compute: more workers than processors.
WORKERS ?= 6
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup
test: .venv/installed  ## the tests that a change is likely to break; a missing server skips its tests with a reason (CI=true: fails)
	$(PYTEST) --ignore tests/house -m "not slow and not matrix"

test-slow: .venv/installed  ## the other tests: long ones, and those that repeat on other engines
	$(PYTEST) --ignore tests/house -m "slow or matrix"

test-all: .venv/installed  ## every test
	$(PYTEST)

check: .venv/installed  ## lint, format, types, imports, words, documentation, licences, package metadata, pins, infra/
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/house
	rm -rf .venv/dist
	$(BIN)/hatchling build --directory .venv/dist
	$(BIN)/twine check --strict .venv/dist/*
	$(BIN)/uv pip compile $(LOCK_DEMO) --quiet --output-file .venv/requirements.txt
	diff requirements.txt .venv/requirements.txt
	$(BIN)/uv pip compile $(LOCK_DEV) --quiet --output-file .venv/requirements-dev.txt
	diff requirements-dev.txt .venv/requirements-dev.txt
	$(BIN)/uv pip compile $(LOCK_MINISTACK) --quiet --output-file .venv/ministack.txt
	diff tests/ministack.txt .venv/ministack.txt
	$(BIN)/uv pip compile $(LOCK_IMAGE) --quiet --output-file .venv/image.txt
	diff infra/requirements.txt .venv/image.txt
	$(BIN)/uv pip compile $(LOCK_AWS) --quiet --output-file .venv/aws.txt
	diff infra/aws/requirements.txt .venv/aws.txt
	$(BIN)/hadolint infra/Dockerfile
	$(BIN)/cfn-lint infra/aws/template.yaml
	$(BIN)/kubernetes-validate --quiet --strict $(filter-out %/kustomization.yaml,$(wildcard infra/kubernetes/*.yaml))

sbom: .venv/installed  ## bills of materials of the package, the image and the functions, in .venv/sbom (CycloneDX JSON)
	$(BIN)/python -m tests.house.sbom

bench: package  ## benchmarks: the figures in the README
	$(BIN)/python -m tests.bench

bench-peers: .venv/installed .venv/peers/installed  ## the road from a callback to a hook, beside other programs; PEERS="arq bullmq" for some
	$(BIN)/python -m tests.bench.peers $(PEERS)

# The programs that are measured beside this one share no dependencies with it. They need Node.js, npm and redis-server.
PEERS_IN := tests/bench/peers
.venv/peers/installed: $(PEERS_IN)/requirements.txt $(PEERS_IN)/package.json
	test -x .venv/peers/bin/python || $(PYTHON) -m venv .venv/peers
	.venv/peers/bin/python -m pip install --quiet -r $(PEERS_IN)/requirements.txt
	cp $(PEERS_IN)/package.json .venv/peers/
	npm install --prefix .venv/peers --silent --no-package-lock --ignore-scripts --no-audit --no-fund
	touch $@

MINUTES ?= 30
SEED ?= 1
ROUNDS ?= 1000000
torture: .venv/installed  ## kills, faults, strangers, simulated days, for MINUTES; PARTS="kills" for some, ROUNDS=1 to repeat a SEED
	$(BIN)/python -m tests.torture $(PARTS) --minutes $(MINUTES) --seed $(SEED) --rounds $(ROUNDS)

# What `make demo` installs: the package with its sandbox, and what builds it.
LOCK_DEMO := pyproject.toml --universal --extra sandbox --group build --generate-hashes --no-header
# What `make test` adds: every extra, and the tools. One version of a package in both.
LOCK_DEV := pyproject.toml --universal --all-extras --group dev --constraint requirements.txt --generate-hashes --no-header
# Dependencies of the container image. For hooks on other buses: make lock EXTRAS="postgres kafka"
EXTRAS ?= postgres
LOCK_IMAGE := pyproject.toml $(EXTRAS:%=--extra %) --universal --generate-hashes --no-header
# Dependencies on Lambda: no server, command line or metrics. For hooks on other buses: make lock AWS_EXTRAS=kafka
AWS_EXTRAS ?=
NOT_ON_LAMBDA := uvicorn uvloop httptools click colorama prometheus-client pycparser
LOCK_AWS := pyproject.toml $(AWS_EXTRAS:%=--extra %) $(NOT_ON_LAMBDA:%=--no-emit-package %) --universal --generate-hashes --no-header
# A stand-in for AWS, in a separate virtual environment: nothing else shares its dependencies.
LOCK_MINISTACK := tests/ministack.in --universal --generate-hashes --no-header
lock: .venv/installed  ## upgrade the pins of all dependencies in pyproject.toml
	$(BIN)/uv pip compile $(LOCK_DEMO) --quiet --upgrade --output-file requirements.txt
	$(BIN)/uv pip compile $(LOCK_DEV) --quiet --upgrade --output-file requirements-dev.txt
	$(BIN)/uv pip compile $(LOCK_MINISTACK) --quiet --upgrade --output-file tests/ministack.txt
	$(BIN)/uv pip compile $(LOCK_IMAGE) --quiet --upgrade --output-file infra/requirements.txt
	$(BIN)/uv pip compile $(LOCK_AWS) --quiet --upgrade --output-file infra/aws/requirements.txt

# Wheels for Lambda's platform, and bytecode of this Python version: deploy it with the same Runtime=pythonX.Y.
ARCH ?= x86_64
CONFIG ?= relay.toml
PACKAGE := infra/aws/build
package: .venv/installed  ## infra/aws/build, the code of the functions in infra/aws/template.yaml, with CONFIG as relay.toml
	rm -rf $(PACKAGE)
	$(BIN)/uv pip install --quiet --target $(PACKAGE) --python $(BIN)/python --python-platform $(ARCH)-manylinux_2_28 \
		--only-binary :all: --require-hashes --no-deps -r infra/aws/requirements.txt
	cp -r receiver submitter $(PACKAGE)
	rm -rf $(PACKAGE)/bin $(PACKAGE)/submitter/sandbox
	if test -e $(CONFIG); then cp $(CONFIG) $(PACKAGE)/relay.toml; else touch $(PACKAGE)/relay.toml; fi
	find $(PACKAGE) -name __pycache__ -prune -exec rm -rf {} +
	$(BIN)/python -m compileall -q --invalidation-mode unchecked-hash $(PACKAGE)
	@$(BIN)/python -c 'import sys; print("$(PACKAGE): deploy it with Runtime=python%d.%d Architecture=$(ARCH)" % sys.version_info[:2])'

install: .venv/installed

.venv/demo: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or later is needed: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing the package and its sandbox into .venv (once) ..."
	$(BIN)/python -m pip install --require-hashes -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	cp requirements.txt .venv/
	touch $@

.venv/installed: .venv/demo requirements-dev.txt tests/ministack.txt infra/requirements.txt infra/aws/requirements.txt
	@echo "Installing the tools and every extra into .venv (once; about 1 GB) ..."
	$(BIN)/python -m pip install --require-hashes -r requirements-dev.txt
	test -x .venv/ministack/bin/python || $(PYTHON) -m venv .venv/ministack
	.venv/ministack/bin/python -m pip install --quiet --require-hashes -r tests/ministack.txt
	cp requirements-dev.txt tests/ministack.txt .venv/
	cp infra/requirements.txt .venv/image.txt
	cp infra/aws/requirements.txt .venv/aws.txt
	touch $@

clean:
	rm -rf .venv demo-output $(PACKAGE)
