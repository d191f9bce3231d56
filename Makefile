# Everything runs in .venv, which each target makes and fills as needed. A machine needs only make,
# CPython >= 3.10 and a package index (or a WHEELHOUSE that holds what the index would).
PYTHON     ?= python3
# A folder of wheels for pip to look in besides the index; a detectron2 wheel in it is installed.
WHEELHOUSE ?= $(HOME)/.cache/kd_det/wheels
# Further arguments for pytest, such as PYTEST_ARGS="-k review -x".
PYTEST_ARGS ?=
# Processes that share the tests; each takes up to 3 GB.
TEST_WORKERS ?= 2

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip --disable-pip-version-check $(if $(CI),--quiet)
D2_GUIDE := https://detectron2.readthedocs.io/tutorials/install.html

# The name of the stamp changes with the names and sizes of the wheels, so that a wheel that
# appears later is installed by the next target.
WHEELS := $(shell cd "$(WHEELHOUSE)" 2>/dev/null && wc -c *.whl 2>/dev/null | cksum | cut -d ' ' -f 1)
INSTALLED := $(VENV)/.installed-$(or $(WHEELS),none)

# Makes --find-links the positional parameters of a recipe's shell, if there is such a folder.
FIND_LINKS = if [ -d "$(WHEELHOUSE)" ]; then set -- --find-links "$(WHEELHOUSE)"; else set --; fi

.PHONY: help quickstart test lint docs clean
.DEFAULT_GOAL := help

help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

quickstart: $(INSTALLED)  ## Distil a small detector on real images in minutes (HOST=detectron2 for Detectron2)
	$(BIN)/python tools/quickstart.py $(if $(HOST),--host $(HOST))

test: $(INSTALLED)  ## Run the tests (PYTEST_ARGS="-k review")
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: $(INSTALLED)  ## Check style, formatting and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

docs: $(INSTALLED)-docs  ## Build the documentation into docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

clean:  ## Remove builds and caches; .venv, datasets and outputs stay
	rm -rf build dist docs/_build .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(VENV)/.created:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "kd_det needs CPython >= 3.10; PYTHON=$(PYTHON) gives: $$("$(PYTHON)" --version 2>&1 | head -n 1)." \
	       "Name a newer one, for example: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@"$(PYTHON)" -m venv $(VENV) || { \
	  echo "$(PYTHON) could not make a virtual environment (reason above)." \
	       "On Debian and Ubuntu its package python3-venv is needed." >&2; exit 1; }
	@touch $@

# torch and torchvision go into one pip command without a version, so that pip picks a pair that
# was built together.
$(INSTALLED): pyproject.toml setup.py | $(VENV)/.created
	@echo "Installing kd_det and what it needs into $(VENV). The first time, torch is a download of gigabytes."
	@$(FIND_LINKS); set -e; \
	if ls "$(WHEELHOUSE)"/detectron2-*.whl >/dev/null 2>&1; then \
	  $(PIP) install --no-index --no-deps --force-reinstall "$$@" detectron2 || \
	    echo "No detectron2 wheel in $(WHEELHOUSE) fits $$($(BIN)/python --version) (pip's reason above)." >&2; \
	fi; \
	extras=all,dev; \
	if $(PIP) show --quiet detectron2 2>/dev/null; then extras=all,dev,detectron2; else \
	  echo "Detectron2: not installed, and no wheel that fits in WHEELHOUSE=$(WHEELHOUSE). Skipped; the rest works without it. Its install guide: $(D2_GUIDE)"; \
	fi; \
	$(PIP) install "$$@" torch torchvision -e ".[$$extras]"
	@$(BIN)/python -c 'import torch, torchvision; torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)' || { \
	  echo "torch and torchvision in $(VENV) were not built for each other (error above). Remove $(VENV)" \
	       "and any lone torch wheel that pip is told to look at (WHEELHOUSE, PIP_FIND_LINKS), then try again." >&2; exit 1; }
	@if $(PIP) show --quiet detectron2 2>/dev/null; then \
	  $(BIN)/python -W ignore -c 'import detectron2.model_zoo, detectron2.modeling' || { \
	    echo "Detectron2 in $(VENV) does not import beside this torch (error above). Build its wheel anew, or go" \
	         "without it: take the wheel out of WHEELHOUSE=$(WHEELHOUSE) and $(BIN)/python -m pip uninstall detectron2" >&2; exit 1; }; fi
	@rm -f $(VENV)/.installed-* && touch $@

$(INSTALLED)-docs: $(INSTALLED)
	@$(FIND_LINKS); $(PIP) install "$$@" -e ".[docs]"
	@touch $@
