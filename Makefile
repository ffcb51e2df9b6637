# latentc: `make demo` and `make test` each do all their own set-up and re-run in seconds.

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed

PYTEST_ARGS ?=
# Test processes. Exports keep one core busy, so that two take little more than half of the time.
TEST_JOBS   ?= 2
DEMO_ARGS   ?=
GPU_CHECK_ARGS ?=
FUZZ_ARGS   ?= --minutes 30
CHAOS_ARGS  ?=
SOAK_ARGS   ?=
# Where the figures of docs/reliability.md are kept; the page is made from them.
RECORDS     := docs/verified/reliability

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all fuzz chaos soak gpu-check lint format clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make the virtual environment in .venv and install everything into it

# A half-made environment (an interrupted run) has no stamp: its pip is tried, and the
# environment is made anew if that fails. --no-input and the constraints keep the install
# to the tested set.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "latentc needs Python 3.11 or newer, and '$(PYTHON)' is not:" \
	       "install it, or name one with 'make PYTHON=/path/to/python3.11'." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments:" \
	       "on Debian and Ubuntu run 'apt-get install python3-venv'." >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || { \
	  echo "making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv --clear $(VENV); }
	$(PY) -m pip install --no-input --disable-pip-version-check --quiet \
	  --constraint constraints.txt --editable '.[all,dev]'
	@touch $@

demo: $(STAMP) ## export the built-in model, verify it, and make images in build/demo
	$(PY) -m latentc.demo -o build/demo $(DEMO_ARGS)

test: $(STAMP) ## run the tests (PYTEST_ARGS="-k noise -x" and the like)
	$(PY) -m pytest --numprocesses $(TEST_JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-all: $(STAMP) ## run every combination of pipelines and engines too, and record it for docs/support.md
	$(PY) -m pytest --numprocesses $(TEST_JOBS) --dist loadfile --no-loadscope-reorder \
	  -m "not fullsize and not gpu and not peers" --record docs/verified/tests.json $(PYTEST_ARGS)
	$(PY) -m tests.support_page

fuzz: $(STAMP) ## fuzz every parser of what comes from outside, for half an hour
	$(PY) -m pip install --no-input --disable-pip-version-check --quiet \
	  --constraint constraints.txt --editable '.[fuzz]'
	$(PY) -m tests.fuzz --record $(RECORDS)/fuzz.json $(FUZZ_ARGS)
	$(PY) -m tests.reliability

chaos: $(STAMP) ## kill, fill disks, write at once: what is on the disk must stay whole
	$(PY) -m tests.chaos --record $(RECORDS)/chaos.json $(CHAOS_ARGS)
	$(PY) -m tests.reliability

soak: $(STAMP) ## make images for long; memory, descriptors and threads must stay level
	$(PY) -m tests.soak --record $(RECORDS)/soak.json $(SOAK_ARGS)
	$(PY) -m tests.reliability

gpu-check: $(STAMP) ## run what can run on this machine's NVIDIA GPU; a record goes to docs/verified
	$(PY) -m latentc.benchmarks.gpu_check $(GPU_CHECK_ARGS)

lint: $(STAMP) ## ruff, mypy and import-linter
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

format: $(STAMP) ## let ruff fix and format the code
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## remove what was built, and the caches
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## clean, and remove the virtual environment
	rm -rf $(VENV)
