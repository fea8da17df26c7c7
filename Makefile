# Everything a newcomer needs; both run on a fresh machine with Python >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
QUICKSTART_DIR ?= /tmp/quickstart
STAMP := $(VENV)/.installed
ORACLE := $(VENV)/oracle-4.37

.PHONY: help install quickstart test lint clean

help:
	@echo "make quickstart  install into .venv, train a small T5, show results"
	@echo "make test        install into .venv, run all tests"
	@echo "make lint        ruff check and format check"

$(STAMP): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fat5_jax needs Python 3.11 or later; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

install: $(STAMP)

quickstart: $(STAMP)
	$(BIN)/python -m fat5_jax.train --gin_file=recipes/quickstart.gin --gin.MODEL_DIR=$(QUICKSTART_DIR)

# The oldest transformers that exports must load in, beside the current one.
$(ORACLE): $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --target $@ transformers==4.37.1 tokenizers==0.15.2 huggingface-hub==0.23.4

test: $(STAMP) $(ORACLE)
	$(BIN)/python -m pytest -n 2 tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info
