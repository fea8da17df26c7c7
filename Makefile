# Everything a newcomer needs; both run on a fresh machine with Python >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
QUICKSTART_DIR ?= /tmp/quickstart
STAMP := $(VENV)/.installed
ORACLE := $(VENV)/oracle-4.37
GPU_ENV := $(VENV)/gpu
LIBTPU := $(VENV)/libtpu
CHROMIUM := $(VENV)/chromium

.PHONY: help install quickstart gpu-env test test-slow test-slow-ci test-chips \
  test-chips-ci lint clean

help:
	@echo "make quickstart  install into .venv, train a small T5, show results"
	@echo "make test        install into .venv, run the tests"
	@echo "make test-slow   whole runs: killed, stopped, on four hosts, every mesh"
	@echo "make test-chips  compile for TPUs and GPUs that are not here"
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

# The TPU's compiler, where only the tests see it: with it installed, jax looks
# for a TPU whenever it starts.
$(LIBTPU): $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --target $@ 'libtpu==0.0.42.*'

# Mosaic GPU needs jax 0.11, hence Python 3.12; its compilers need no GPU. Where
# it cannot be made, `missing` says why, and the tests that want it skip.
$(GPU_ENV): $(STAMP)
	@rm -rf $@ && mkdir -p $@
	@( PYENV_VERSION=$${PYENV_VERSION-3.12.1} python3.12 -m venv $@ \
	  && $@/bin/python -m pip install --quiet jax==0.11.2 numpy 'pytest>=8' \
	  && $@/bin/python -m pip install --quiet --no-deps \
	    jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2 \
	    'nvidia-cuda-nvcc==13.0.*' 'nvidia-nvvm==13.0.*' triton==3.6.0 \
	) > $@/log 2>&1 || ( tail -1 $@/log > $@/missing; \
	  echo "GPU tests will be skipped: $$(cat $@/missing)" )

gpu-env: $(GPU_ENV)

UNPACK = const [, name] = process.argv, fs = require("fs"); fs.writeFileSync(name.slice(0, -3), require("zlib").brotliDecompressSync(fs.readFileSync(name)))

# A browser that looks at the report; npm has one whole. Where it cannot be made,
# `missing` says why, and the tests that want it skip.
$(CHROMIUM): $(STAMP)
	@rm -rf $@ && mkdir -p $@
	@( cd $@ && npm pack --silent @sparticuz/chromium@147.0.0 \
	  && tar xzf *.tgz --strip-components=2 --wildcards 'package/bin/*' \
	  && rm *.tgz && for file in *.br; do node -e '$(UNPACK)' $$file || exit 1; done \
	  && for file in *.tar; do mkdir $${file%.tar} \
	    && tar xf $$file -C $${file%.tar} || exit 1; done \
	  && rm *.br *.tar && chmod +x chromium \
	) > $@.log 2>&1 || ( tail -1 $@.log > $@/missing; rm -f $@/chromium; \
	  echo "tests of the report in a browser will be skipped: $$(cat $@/missing)" )
	@mv $@.log $@/log

# A test that hangs fails, and says where it was.
PYTEST = $(BIN)/python -m pytest -n 2

test: $(STAMP) $(ORACLE) $(CHROMIUM)
	$(PYTEST) --timeout=600 --dist loadgroup tests -m 'not chips and not slow'

test-slow: $(STAMP)
	$(PYTEST) --timeout=1800 tests -m slow

# What CI has the time for: some of the kills, no mesh.
test-slow-ci: $(STAMP)
	$(PYTEST) --timeout=1800 tests -m 'slow and not thorough'

test-chips: $(STAMP) $(LIBTPU) $(GPU_ENV)
	$(PYTEST) --timeout=1800 tests -m chips -rs

# One chip of each backend.
test-chips-ci: $(STAMP) $(LIBTPU) $(GPU_ENV)
	$(PYTEST) --timeout=1800 tests -m 'chips and not thorough' -rs

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info
