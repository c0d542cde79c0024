# Everything runs in .venv, from the pins in requirements.txt.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check bench lock install clean

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

bench: .venv/installed  ## the figures of the README
	$(BIN)/python -m tests.bench

LOCK := pyproject.toml --universal --all-extras --group dev --generate-hashes --no-header
# A stand-in for AWS, whose own requirements are nobody else's.
LOCK_MINISTACK := tests/ministack.in --universal --generate-hashes --no-header
lock: .venv/installed  ## pin anew what pyproject.toml asks for
	$(BIN)/uv pip compile $(LOCK) --quiet --upgrade --output-file requirements.txt
	$(BIN)/uv pip compile $(LOCK_MINISTACK) --quiet --upgrade --output-file tests/ministack.txt

install: .venv/installed

.venv/installed: requirements.txt tests/ministack.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or later is needed: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	test -x .venv/ministack/bin/python || $(PYTHON) -m venv .venv/ministack
	.venv/ministack/bin/python -m pip install --quiet --require-hashes -r tests/ministack.txt
	cp requirements.txt tests/ministack.txt .venv/
	touch $@

clean:
	rm -rf .venv demo-output
