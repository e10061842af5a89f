# `make book` and `make test` are all that most people need: each sets up the
# environment first. Works with GNU make 3.81 (macOS) and later.
SHELL := /bin/bash
PY := .venv/bin/python
PROFILE ?= cpu

# Idle OpenMP threads that spin slow down everything else on a busy machine.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup book test lab reproduce lint format lock accessibility clean distclean

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sort \
	  | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'
	@echo
	@echo "  make book PROFILE=smoke      every chapter in its shortest form"
	@echo "  make book PYTHON=python3.12  with another Python (3.11-3.13)"
	@echo "  make lock UPGRADE=1          newest versions into requirements.lock"

setup: ## make or update .venv (the other targets do it themselves)
	@PYTHON="$(PYTHON)" .ci/setup

book: setup ## run all notebooks and build the book into _build/html
	@$(PY) book/build.py --profile $(PROFILE)

test: export OMP_NUM_THREADS ?= 1
test: setup lint ## lint, check types, run all tests
	$(PY) -m pytest -n logical --maxprocesses 4 --dist worksteal

lab: setup ## open the notebooks in JupyterLab
	$(PY) -m jupyter lab book

reproduce: setup ## run the grid again: records, tables, figures (minutes to hours)
	.venv/bin/o2cap reproduce

accessibility: setup ## check the built book's pages with axe, in Chromium
	@$(PY) book/accessibility.py

lint: setup ## ruff and mypy
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

format: setup ## format the code, mend what ruff can mend, clean the notebooks
	$(PY) book/heads.py
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

lock: setup ## pin the dependencies of pyproject.toml in requirements.lock
	$(PY) -m uv pip compile pyproject.toml --universal --python-version 3.11 \
	  --all-extras --generate-hashes --no-emit-index-url --no-emit-find-links \
	  --no-header --quiet $(if $(UPGRADE),--upgrade) --output-file requirements.lock

clean: ## delete what was built, keep .venv
	rm -rf _build .pytest_cache .mypy_cache .ruff_cache book/.ruff_cache .hypothesis
	find o2cap o2cap_book book tests -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## delete .venv too
	rm -rf .venv *.egg-info
