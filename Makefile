# `make help` lists the targets. Everything installs into .venv from the package registry.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint type check bench fmt clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-10s %s\n", $$1, $$2}'

# torch goes in alone and first: its CPU build, where the registry offers one, satisfies all that follows.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $(STAMP)

install: $(STAMP)  ## Set up .venv with the tested versions

demo: $(STAMP)  ## Train, save, reload and merge a federated FedPara model on real digits (minutes)
	$(BIN)/python examples/digits_demo.py --output_dir outputs/digits
	$(BIN)/python examples/digits_reload.py outputs/digits

lint: $(STAMP)  ## Style, docstrings and imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(STAMP)  ## Static types of src
	$(BIN)/mypy

test: $(STAMP) lint type  ## Lint, types and the test suite
	$(BIN)/pytest -n auto

test-slow: $(STAMP)  ## The tests that take minutes
	$(BIN)/pytest -m slow

check: test demo  ## All that must pass before a change is done

bench: $(STAMP)  ## Measure and rewrite the tables in benchmarks/results
	$(BIN)/python benchmarks/digits_equal_size.py

fmt: $(STAMP)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove what make made
	rm -rf $(VENV) outputs build dist
