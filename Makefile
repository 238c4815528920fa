# Two commands set everything up on a machine that has Python 3.10+ and make:
#   make demo   own environment, install, quickstart
#   make test   own environment, install, tests

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# The CPU build of torch where the index has one under this version; plain `torch` would bring gigabytes.
TORCH ?= torch==2.13.0
STAMP = $(VENV)/.installed

.PHONY: demo test style quality clean

demo: $(STAMP)
	$(BIN)/python examples/quickstart.py

test: $(STAMP)
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadscope

style: $(STAMP)
	$(BIN)/ruff check --fix hf_warmstart tests examples benchmarks
	$(BIN)/ruff format hf_warmstart tests examples benchmarks

quality: $(STAMP)
	$(BIN)/ruff check hf_warmstart tests examples benchmarks
	$(BIN)/ruff format --check hf_warmstart tests examples benchmarks
	$(BIN)/mypy

$(STAMP): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info runs
