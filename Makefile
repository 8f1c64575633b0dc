# Every target sets up what it needs: a virtual environment in .venv, packages by pip.
PYTHON ?= python3
VENV ?= .venv
DEMO_MINUTES ?= 8
BIN = $(VENV)/bin

# On Linux without an NVIDIA driver, PyTorch's own index has a build without gigabytes of CUDA.
CPU_TORCH = [ "$$(uname -s)" != Linux ] || [ -e /proc/driver/nvidia ] || $(BIN)/pip install -q --retries 0 --timeout 10 \
	--index-url https://download.pytorch.org/whl/cpu 'torch>=2.11,<2.14' 2>/dev/null || true

.PHONY: demo test test-slow lint clean

demo: $(VENV)/.demo
	$(BIN)/baleen demo --minutes $(DEMO_MINUTES)

test: $(VENV)/.dev
	$(BIN)/pytest -m "not slow"

test-slow: $(VENV)/.slow
	$(BIN)/pytest -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests bench
	$(BIN)/ruff format --check src tests bench
	$(BIN)/pyright

$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Baleen needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || { $(CPU_TORCH); }
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install -q -e '.[demo,report]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install -q -e '.[dev]'
	touch $@

$(VENV)/.slow: $(VENV)/.dev
	$(BIN)/pip install -q -e '.[slow]'
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info
