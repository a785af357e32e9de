# The first two are all that a newcomer needs: make quickstart, make test.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
SHELL := /bin/bash
# What Python and pytest compile is kept: each process of a run would compile it again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: quickstart test test-newer test-slow coverage test-examples lint types docs reference
.PHONY: test-engines test-engines-full test-gpu wheel clean

quickstart: $(VENV)/installed  ## quantize the demo model, check it, and see it write
	rm -rf quantized-demo
	$(BIN)/qplug quantize qplug:demo --algo awq --scheme W4A16 --backend sglang --out ./quantized-demo
	$(BIN)/qplug verify ./quantized-demo
	$(BIN)/python examples/continue_text.py qplug:demo ./quantized-demo

test: $(VENV)/installed-test  ## the tests that need neither a network nor a GPU
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

test-newer:  ## the same, on Python 3.13 or newer, in an environment of its own
	bash tests/newer_python.sh .venv-newer

test-slow: $(VENV)/installed-slow  ## those that take long
	$(BIN)/python -m pytest -m slow --numprocesses auto --maxprocesses 8 --dist worksteal

coverage: $(VENV)/installed-dev  ## the same, and at least 90 % of core and plugins must have run
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal --cov --cov-report=term

test-examples: $(VENV)/installed-test  ## two plugins of their own, as strangers install them
	bash tests/examples.sh $(BIN)/python

test-engines: $(VENV)/installed-test  ## the real vLLM, on this CPU, in an environment of its own
	$(PYTHON) tests/engines/install_vllm.py .venv-vllm
	QPLUG_VLLM_PYTHON=.venv-vllm/bin/python $(BIN)/python -m pytest -m engine tests/engines

test-engines-full: export QPLUG_ENGINE_TESTS := full
test-engines-full: test-engines  ## every algorithm with every scheme that the tables allow

# Engines are in environments of their own: QPLUG_VLLM_PYTHON and QPLUG_SGLANG_PYTHON name their
# Pythons; QPLUG_VLLM_PYTHONPATH and QPLUG_SGLANG_PYTHONPATH packages beside them;
# QPLUG_VLLM_PYTHON_OPTIONS ({"attention_backend": "TRITON_ATTN"}) more for vllm.LLM, and so on.
# CONTRIBUTING.md says how many processes share the work, and how long they may take.
test-gpu: $(VENV)/installed-test  ## the kernels and the engines, on a host with a GPU
	$(BIN)/python -m pytest -m gpu tests/plugins/algorithms tests/engines

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/installed-dev  ## on every Python that is supported, whichever is installed
	for version in 3.10 3.11 3.12 3.13; do $(BIN)/mypy --python-version $$version || exit 1; done

docs: $(VENV)/installed-dev  ## the site, in ./site; nothing is asked of another host
	$(BIN)/mkdocs build --strict

reference: $(VENV)/installed-dev  ## docs/reference, from the code
	$(BIN)/python tools/generate_reference.py

wheel: $(VENV)/installed-dev  ## build the wheel and try it in an environment of its own
	bash tests/wheel.sh $(BIN)/python

clean:
	rm -rf $(VENV) .venv-newer .venv-vllm quantized-demo dist site

# --- environments: made once, and again when what they are made of changes ---

$(VENV)/created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/installed: $(VENV)/created pyproject.toml constraints.txt
	$(PIP) --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) --editable '.[test,docs]'
	touch $@

$(VENV)/installed-slow: $(VENV)/installed-test
	$(PIP) --editable '.[test,docs,qtorch,eval]' accelerate
	touch $@

$(VENV)/installed-dev: $(VENV)/installed-test
	$(PIP) --editable '.[test,docs,dev]'
	touch $@
