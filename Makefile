# Front door: `make align` and `make test` work on a fresh clone with nothing but Python >= 3.11 and make.
# PYTHON=... chooses the interpreter, STACK=cpu|gpu the stack (default: gpu where nvidia-smi answers), ARGS=... is
# handed on, for instance `make align ARGS="learner.lr=3e-4"` or `make test ARGS="tests/learner -x"`.

PYTHON ?= python3
ifndef STACK
STACK := $(shell if nvidia-smi >/dev/null 2>&1; then echo gpu; else echo cpu; fi)
endif

VENV := .venv
BIN := $(VENV)/bin
# The stamp says which stack .venv holds; it is older than a lock file exactly when there is something to install.
STAMP := $(VENV)/installed-$(STACK)
LOCKS := requirements/$(STACK).txt requirements/dev.txt
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-deps

# One thread per process: many small processes share the machine, and more threads only wait for each other.
export OMP_NUM_THREADS := 1

.PHONY: help setup align test lint clean

help:
	@echo "make setup   create $(VENV) and install the $(STACK) stack"
	@echo "make align   the whole tiny run (setup first): SFT, warm-up, alignment, RLVR, evaluation -> runs/tiny/"
	@echo "make test    the test suite (setup first)"
	@echo "make lint    ruff and pyright (setup first)"
	@echo "make clean   remove $(VENV) and caches; runs/ is kept"
	@echo 'ARGS="..." is handed on to align and test.'

setup: $(STAMP)

$(STAMP): $(LOCKS) pyproject.toml tools/torchvision_hook.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "prism_ray needs Python 3.11 or newer, but PYTHON=$(PYTHON) is not; run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@for other in $(filter-out $(STAMP),$(wildcard $(VENV)/installed-*)); do \
	  echo "$(VENV) holds another stack ($$other); creating it anew"; rm -rf $(VENV); done
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot create virtual environments; install its venv package (often named python3-venv)" >&2; exit 1; }
	@echo "Installing the $(STACK) stack into $(VENV): some minutes and gigabytes, this once."
	@torch=$$(grep '^torch==' requirements/$(STACK).txt); $(PIP_INSTALL) "$$torch" || { \
	  echo "pip could not install $$torch. A CPU build (+cpu) is not on every package index: set PIP_EXTRA_INDEX_URL" \
	       "to PyTorch's CPU wheel index and run make again." >&2; exit 1; }
	@$(PIP_INSTALL) $(addprefix -r ,$(LOCKS))
	@$(PIP_INSTALL) --editable .
	@$(if $(filter cpu,$(STACK)),$(BIN)/python tools/torchvision_hook.py,:)
	@touch $@

align: $(STAMP)
	$(BIN)/python jobs/align.py --config configs/tiny.yaml $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

clean:
	rm -rf $(VENV) *.egg-info build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
