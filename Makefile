# Everything runs in .venv, from the pins in requirements.txt.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check bench lock install clean package

VENDOR ?= kling
demo: .venv/installed  ## the whole road, offline; VENDOR=novita, highway, aihubmax or oxen for another vendor's
	$(BIN)/kling-relay demo --vendor $(VENDOR)

test: .venv/installed  ## every test; what needs a server that is not there is skipped with a reason
	$(BIN)/python -m pytest

check: .venv/installed  ## style, types, the import contract, fresh pins
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/uv pip compile $(LOCK) --quiet --output-file .venv/requirements.txt
	diff requirements.txt .venv/requirements.txt
	$(BIN)/uv pip compile $(LOCK_MINISTACK) --quiet --output-file .venv/ministack.txt
	diff tests/ministack.txt .venv/ministack.txt
	$(BIN)/uv pip compile $(LOCK_IMAGE) --quiet --output-file .venv/image.txt
	diff infra/requirements.txt .venv/image.txt
	$(BIN)/uv pip compile $(LOCK_AWS) --quiet --output-file .venv/aws.txt
	diff infra/aws/requirements.txt .venv/aws.txt
	$(BIN)/hadolint infra/Dockerfile
	$(BIN)/cfn-lint infra/aws/template.yaml
	$(BIN)/kubernetes-validate --quiet --strict $(filter-out %/kustomization.yaml,$(wildcard infra/kubernetes/*.yaml))

bench: package  ## the figures of the README
	$(BIN)/python -m tests.bench

LOCK := pyproject.toml --universal --all-extras --group dev --generate-hashes --no-header
# What the container image holds. For hooks on other buses: make lock EXTRAS="postgres kafka"
EXTRAS ?= postgres
LOCK_IMAGE := pyproject.toml $(EXTRAS:%=--extra %) --universal --generate-hashes --no-header
# What a function on Lambda needs: no server, no command line, no metrics. For hooks elsewhere: make lock AWS_EXTRAS=kafka
AWS_EXTRAS ?=
NOT_ON_LAMBDA := uvicorn uvloop httptools click colorama prometheus-client pycparser
LOCK_AWS := pyproject.toml $(AWS_EXTRAS:%=--extra %) $(NOT_ON_LAMBDA:%=--no-emit-package %) --universal --generate-hashes --no-header
# A stand-in for AWS, whose own requirements are nobody else's.
LOCK_MINISTACK := tests/ministack.in --universal --generate-hashes --no-header
lock: .venv/installed  ## pin anew what pyproject.toml asks for
	$(BIN)/uv pip compile $(LOCK) --quiet --upgrade --output-file requirements.txt
	$(BIN)/uv pip compile $(LOCK_MINISTACK) --quiet --upgrade --output-file tests/ministack.txt
	$(BIN)/uv pip compile $(LOCK_IMAGE) --quiet --upgrade --output-file infra/requirements.txt
	$(BIN)/uv pip compile $(LOCK_AWS) --quiet --upgrade --output-file infra/aws/requirements.txt

# Wheels for Lambda's machine, and bytecode of this Python: deploy it with Runtime=pythonX.Y of the same.
ARCH ?= x86_64
CONFIG ?= relay.toml
PACKAGE := infra/aws/build
package: .venv/installed  ## infra/aws/build, what the functions of infra/aws/template.yaml run, with CONFIG in it
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

.venv/installed: requirements.txt tests/ministack.txt infra/requirements.txt infra/aws/requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or later is needed: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	test -x .venv/ministack/bin/python || $(PYTHON) -m venv .venv/ministack
	.venv/ministack/bin/python -m pip install --quiet --require-hashes -r tests/ministack.txt
	cp requirements.txt tests/ministack.txt .venv/
	cp infra/requirements.txt .venv/image.txt
	cp infra/aws/requirements.txt .venv/aws.txt
	touch $@

clean:
	rm -rf .venv demo-output $(PACKAGE)
