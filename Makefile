# Two commands set up and show it: `make demo`, and `make test`. Both install first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 4
PROMPT ?= What is the capital of France?
# GPUs take torch's normal build, with the Triton that belongs to it. Where there are none, this
# release has a small CPU build.
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU || echo torch==2.13.0 triton==3.9.0)
# The versions that the tests ran with; empty takes the newest that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
PIP = $(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

.PHONY: install update demo check test test-faults test-gpu bench recording clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip setuptools
	$(if $(strip $(TORCH)),$(PIP) $(TORCH))
	$(PIP) --no-build-isolation --editable ".[demo,dev]"
	touch $@

# The newest versions, kept once the checks and tests have passed with them.
update:
	rm -rf $(VENV)
	$(MAKE) CONSTRAINTS= check test
	{ echo "# What the tests ran with; make update writes this file. torch and Triton: see Makefile."; \
	$(BIN)/python -m pip freeze --all --exclude-editable \
	| grep -viE "^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)=="; } > constraints.new
	mv constraints.new constraints.txt

demo: install
	$(BIN)/mistral-chat demo --stats --temperature 0 --prompt "$(PROMPT)"
	@if [ -t 0 ] && [ -t 1 ]; then $(BIN)/mistral-chat demo; \
	else echo "For a chat: $(BIN)/mistral-chat demo" >&2; fi

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# More processes of tests than there may be cores: tests wait for other processes half of the time.
# Bytecode is kept, whatever the environment says: some tests start a fresh Python.
test: install
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -m "not gpu" --numprocesses $(WORKERS) --dist worksteal

# Signals to ranks and launchers in every phase: a table, in about an hour. `test` has a sample.
test-faults: install
	$(BIN)/python -m tests.scripts.faults

# On a machine with GPUs, with the torch that is installed there. Most of the time goes to compiling
# kernels, on one core a process of tests.
test-gpu:
	$(PYTHON) -m pytest -q -m "gpu and not alone" --numprocesses 4 --dist worksteal tests/gpu
	$(PYTHON) -m pytest -q -m "gpu and alone" tests/gpu

bench: install
	$(BIN)/mistral-chat bench "$$($(BIN)/mistral-chat demo --path)" --device cpu --contexts 128,512 \
	  --prompts 128,512 --peer transformers

# The README's picture of a session, from a real one.
recording: install
	$(BIN)/python -m tests.scripts.record docs/session.svg

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
