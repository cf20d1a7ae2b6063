# Two commands do everything: `make train` trains the model of the README, `make test` runs all tests.
# All targets need Python 3.11 or newer and nothing else; they make the environment .venv first.

PYTHON ?= python3
VENV ?= .venv
CONFIG ?= recurrent
ARGS ?=
RUN := $(VENV)/bin
# Imports compile the modules that they need. pip would compile all, 31,000 of .[dev], for minutes.
PIP := $(RUN)/python -m pip --disable-pip-version-check install --quiet --no-compile

.PHONY: help train test docs base dev smoke

help:
	@echo 'make train   makes $(VENV) with what training needs, and trains the model of the README'
	@echo '             CONFIG=reasoning    another experiment: audio, image, multimodal, reasoning, ...'
	@echo '             ARGS="--config.train.steps=100"   more options'
	@echo 'make test    makes or updates $(VENV) with what development needs, and runs all tests'
	@echo '             ARGS="tests/models -n 0"   some of them'
	@echo 'make docs    makes $(VENV) with what the documentation needs, and builds the site in build/site'
	@echo 'make base    only makes $(VENV), for training, evaluating and generating text'
	@echo 'make dev     only makes or updates $(VENV), with everything that development needs'
	@echo 'make smoke   makes $(VENV) with little more than the base, and runs the most important tests'
	@echo 'PYTHON=python3.13 and VENV=folder choose another Python and another environment.'

train: base
	@echo '== training $(CONFIG); Ctrl-C saves, and the same command resumes'
	$(RUN)/megatransformer train --config=$(CONFIG) $(ARGS)

test: dev
	@echo '== all tests'
	$(RUN)/pytest $(ARGS)

# Strict: a page that no menu has, or a link that leads nowhere, is an error.
docs: $(VENV)/.docs
	@echo '== building the documentation: build/site/index.html'
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict --quiet

smoke: $(VENV)/.smoke
	@echo '== smoke tests'
	$(RUN)/pytest -m smoke $(ARGS)

base: $(VENV)/.base
dev: $(VENV)/.dev

# What is installed is noted in the environment, so that it is installed again when setup.py changes.
# The wider set has all that the narrower one has.
$(VENV)/.base: $(VENV)/bin/python setup.py
	@echo '== installing what training needs into $(VENV): about 900 MB on disk'
	$(PIP) --editable .
	@touch $@

$(VENV)/.smoke: $(VENV)/bin/python setup.py
	@echo '== installing the base and pytest into $(VENV)'
	$(PIP) --editable '.[test]'
	@touch $@ $(VENV)/.base

$(VENV)/.docs: $(VENV)/bin/python setup.py
	@echo '== installing the base and MkDocs into $(VENV)'
	$(PIP) --editable '.[docs]'
	@touch $@ $(VENV)/.base

$(VENV)/.dev: $(VENV)/bin/python setup.py
	@echo '== installing what development needs into $(VENV): about 3 GB on disk'
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.base $(VENV)/.smoke $(VENV)/.docs

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed; name one: make $(MAKECMDGOALS) PYTHON=python3.13'; exit 1; }
	@echo '== making $(VENV)'
	$(PYTHON) -m venv $(VENV)
