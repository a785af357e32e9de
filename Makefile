# The first two are all that a newcomer needs: make quickstart, make test.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
SHELL := /bin/bash

.PHONY: quickstart test test-examples lint types test-engines test-gpu wheel clean

quickstart: $(VENV)/installed  ## quantize the demo model, check it, and see it write
	rm -rf quantized-demo
	$(BIN)/qplug quantize qplug:demo --algo awq --scheme W4A16 --backend sglang --out ./quantized-demo
	$(BIN)/qplug verify ./quantized-demo
	$(BIN)/python examples/continue_text.py qplug:demo ./quantized-demo

test: $(VENV)/installed-test  ## the tests that need neither a network nor a GPU
	$(BIN)/python -m pytest

test-examples: $(VENV)/installed-test  ## two plugins of their own, as strangers install them
	bash tests/examples.sh $(BIN)/python

test-engines: $(VENV)/installed-test  ## the real vLLM, on this CPU, in an environment of its own
	$(PYTHON) tests/engines/install_vllm.py .venv-vllm
	QPLUG_VLLM_PYTHON=.venv-vllm/bin/python $(BIN)/python -m pytest -m engine tests/engines

test-gpu: $(VENV)/installed-test  ## the kernels, on a host with a GPU
	$(BIN)/python -m pytest -m gpu tests/algorithms

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/installed-dev
	$(BIN)/mypy

wheel: $(VENV)/installed-dev  ## build the wheel and try it in an environment of its own
	bash tests/wheel.sh $(BIN)/python

clean:
	rm -rf $(VENV) .venv-vllm quantized-demo dist

# --- environments: made once, and again when what they are made of changes ---

$(VENV)/created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/installed: $(VENV)/created pyproject.toml constraints.txt
	$(PIP) --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) --editable '.[test]'
	touch $@

$(VENV)/installed-dev: $(VENV)/installed-test
	$(PIP) --editable '.[test,dev]'
	touch $@
