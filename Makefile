# One environment in .venv serves every target; it is brought up to date when pyproject.toml or constraints.txt
# change. PYTHON chooses the interpreter it is made with, ARGS is handed on to the command of a target.
SHELL := /bin/bash
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed
PYTEST := $(BIN)/python -m pytest

# pytest ends with 5 when it selects nothing: a suite nobody has written yet is no failure, but it is said.
define suite
@if [ -d $(2) ]; then $(PYTEST) -m $(1) $(2) $(ARGS); else (exit 5); fi; status=$$?; \
if [ $$status -eq 5 ]; then echo "There are no $(1) tests yet; nothing was checked."; else exit $$status; fi
endef

.DEFAULT_GOAL := help
.PHONY: help install fit test distributed-test slow parity cluster-test deepspeed-test gpu-test torture lint clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' Makefile | expand -t 16

install: $(STAMP) ## make or update .venv
	@:

# The pinned torch comes with its CUDA libraries from the ordinary index and runs on machines without a GPU too.
$(STAMP): pyproject.toml constraints.txt
	@echo "Installing into .venv; the first time this fetches several GB."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

fit: $(STAMP) ## train configs/quickstart.yaml; ARGS="--trainer.max_steps 10" changes it
	@$(BIN)/lightning_prune fit --config configs/quickstart.yaml $(ARGS)

# Two processes share the files of tests; ARGS="-n 0" runs them in one, which a debugger needs.
test: $(STAMP) ## the tests that need nothing but a CPU; ARGS="-k name" selects
	@$(PYTEST) --numprocesses=2 --dist=loadfile --no-loadscope-reorder --durations=20 $(ARGS)

distributed-test: $(STAMP) ## two processes on this machine's CPU against one
	$(call suite,distributed,tests/distributed)

slow: $(STAMP) ## the tests that take minutes each
	$(call suite,slow,tests)

parity: $(STAMP) ## long comparisons with reference implementations
	$(call suite,parity,tests)

cluster-test: $(STAMP) ## tests against a SLURM on this machine
	$(call suite,cluster,tests/cluster)

# DeepSpeed is built from source and asks for torch while it is, so it comes second and without build isolation.
.venv/.deepspeed: $(STAMP)
	@DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation \
		-c constraints.txt -e ".[deepspeed]"
	@touch $@

deepspeed-test: .venv/.deepspeed ## tests of DeepSpeed on the CPU, which they install; ten minutes or more
	$(call suite,deepspeed,tests/distributed)

# Those of DeepSpeed, which want two devices, skip themselves where `make deepspeed-test` has not installed it.
gpu-test: $(STAMP) ## tests that need CUDA devices
	$(call suite,gpu,tests)

torture: $(STAMP) ## tests that kill, fill and corrupt on purpose
	$(call suite,torture,tests)

lint: $(STAMP) ## style, types and the direction of imports
	@status=0; \
	$(BIN)/ruff check . || status=1; \
	$(BIN)/ruff format --check . || status=1; \
	$(BIN)/mypy || status=1; \
	$(BIN)/lint-imports --no-logo || status=1; \
	exit $$status

clean: ## remove caches and build products; .venv and runs/ stay
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .coverage
	@find . -path ./.venv -prune -o -path ./runs -prune -o -type d -name __pycache__ -exec rm -rf {} +
