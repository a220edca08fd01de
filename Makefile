# Each target is one short recipe. `make run` and `make test` set themselves up.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

help:            ## this list
	@sed -n 's/^\([a-z]*\): .*## /\1	/p' $(MAKEFILE_LIST) | sort | expand -t 8

run: $(VENV)/.installed   ## quantize a network to 4 bits on the embedded data: minutes, no network
	$(BIN)/qexp train quantizer=asq bits=4

test: $(VENV)/.tested     ## the fast tests: ten minutes on two cores that other work shares
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: $(VENV)/.tested     ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(VENV)/.tested     ## types
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.installed ## cost of a training step against float
	$(BIN)/qexp bench train

table: $(VENV)/.installed ## rebuild the tables and the figure of README.md and docs/results.md
	$(BIN)/python scripts/make_tables.py
	$(BIN)/python scripts/plot_results.py

clean:           ## remove what was built; runs, data and results stay
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# The environment: made anew only when pyproject.toml changes.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; ok = (3, 10) <= sys.version_info < (3, 14); \
	  sys.exit(0 if ok else "qexp needs Python 3.10 to 3.13; this is %d.%d. Set PYTHON=python3.12, for instance." % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

.PHONY: help run test lint type bench table clean
