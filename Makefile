# Everything runs in .venv; `make setup` builds it from requirements.lock and does nothing when it is up to date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS := .venv-docs
# Tests without a Ray cluster run side by side, a file at a time; a cluster wants the machine for itself.
SIDE_BY_SIDE := -n 2 --dist loadfile

.PHONY: help setup demo demo-gpu test test-all lint audit lock format measure picture docs clean

help: ## Show this help.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## Create .venv with everything in it.

# DeepSpeed is a source package whose build imports torch: torch goes first, and the build sees this environment.
$(STAMP): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep -E '^(torch|setuptools|wheel|ninja|py-cpuinfo|packaging)==' requirements.lock)
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

demo: setup ## Post-train the embedded generator through Ray, on this machine.
	$(BIN)/euphonium train recipes/embedded/demo.yaml name=demo resume=never

demo-gpu: setup ## Post-train it with guidance, all roles on one GPU, which they share by fractions.
	$(BIN)/euphonium train recipes/embedded/one-gpu.yaml name=demo-gpu resume=never

test: setup ## Run the tests that CI runs.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest $(SIDE_BY_SIDE) -m "not slow and not ray"
	$(BIN)/pytest -m "not slow and ray"

test-all: setup ## Run every test, the long ones too, and 10,000 examples of what goes wrong.
	EUPHONIUM_FUZZ_EXAMPLES=$${EUPHONIUM_FUZZ_EXAMPLES:-10000} $(BIN)/pytest $(SIDE_BY_SIDE) -m "not ray"
	$(BIN)/pytest -m ray

lint: setup ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# In an environment of its own: nothing of it is needed to run or to test.
AUDIT := .venv-audit
audit: ## Look for known weaknesses in the sources, and in the packages of requirements.lock.
	test -x $(AUDIT)/bin/bandit || ($(PYTHON) -m venv $(AUDIT) && $(AUDIT)/bin/pip install --quiet bandit==1.9.4)
	$(AUDIT)/bin/bandit --quiet --configfile pyproject.toml --severity-level medium --recursive \
		euphonium actors reward_servers learners orchestrator
	-test -x $(AUDIT)/bin/pip-audit || $(AUDIT)/bin/pip install --quiet pip-audit==2.10.1
	$(AUDIT)/bin/python deploy/audit_lock.py $(AUDIT)/bin/pip-audit

lock: setup ## Renew requirements.lock from pyproject.toml; torch stays as it is. PIP_OPTIONS go to pip.
	$(BIN)/python deploy/renew_lock.py $(PIP_OPTIONS)

format: setup ## Rewrite the sources in the project's format.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

measure: setup ## Count what the sources are made of: sizes, types, circles, docstrings.
	$(BIN)/python benchmarks/structure.py --remote-types

picture: setup ## Draw the packages and their imports anew.
	$(BIN)/python benchmarks/structure.py --picture docs/architecture.svg

docs: $(DOCS)/.installed ## Build the documentation site into site/; a broken link is an error.
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

# An environment of its own: the site needs nothing of what it describes.
$(DOCS)/.installed: requirements-docs.lock
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --disable-pip-version-check -r requirements-docs.lock
	touch $@

clean: ## Remove the environment and all caches (runs/ stays).
	rm -rf $(VENV) $(AUDIT) $(DOCS) site *.egg-info build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
