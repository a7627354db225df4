.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STUBS := foundry/v1

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "error: $(PYTHON) is older than 3.11; use make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	    || { echo "error: $(PYTHON) cannot make environments; on Debian or Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Installing into $(VENV) (about a minute) ..."
	@$(PYTHON) -m venv $(VENV)
	@PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

install: $(VENV)/.installed  ## make .venv with the project and its tools

proto: install  ## regenerate the gRPC stubs
	$(BIN)/python -m grpc_tools.protoc --proto_path=proto --python_out=. --grpc_python_out=. --mypy_out=. --mypy_grpc_out=. \
	    --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	    proto/foundry/v1/*.proto

# Read before anything is made, so that the demo's time includes the installation.
demo: export FOUNDRY_DEMO_BEGAN := $(shell date +%s)
demo: install  ## train a cartridge for examples/handbook.md and ask it (10 minutes on 2 cores)
	@$(BIN)/python examples/demo.py

test: install  ## run all tests
	$(BIN)/python -m pytest

lint: install  ## check style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: install  ## check types
	$(BIN)/mypy

check: lint types test  ## everything that must pass before a change goes in

clean:  ## remove what was built, the environment included; cartridges and the model cache stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis demo-result.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help install proto demo test lint types check clean
