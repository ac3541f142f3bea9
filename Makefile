# The one environment is .venv; `make PYTHON=python3.12 …` chooses the interpreter that makes it.
PYTHON ?= python3

.DEFAULT_GOAL := install
.DELETE_ON_ERROR:
.PHONY: install run test lint bench-projection bench-attacks clean help

install: .venv/.installed  ## make .venv and install the project with its dev extra (default)

run: install  ## the whole pipeline on the digits images
	.venv/bin/manifold-defense run

# Each worker computes on one thread (tests/conftest.py); a whole run is a fixture that each makes for itself.
test: install  ## the tests, on every core
	.venv/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

lint: install  ## ruff and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy --strict gan manifold_defense pipelines benchmarks

# BENCH="--data mnist --set data.root=PATH --filter zoo/mnist/filter --images 1000" for the MNIST figures.
bench-projection: install  ## speed and error of the presets, on the finished digits run (`make run` first)
	.venv/bin/python benchmarks/projection.py $(BENCH)

bench-attacks: install  ## our attacks beside those of foolbox, torchattacks and ART, where installed
	.venv/bin/python benchmarks/attacks.py $(BENCH)

clean:  ## remove .venv, caches and built packages; the results in runs/ stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' Makefile

# pip is what `venv` writes last: an environment that was cut short is made again.
.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "manifold-defense needs Python 3.11 or newer, and $(PYTHON) is not it: make PYTHON=python3.11" >&2; \
	  exit 1; }
	$(PYTHON) -m venv .venv

# The stamp goes first and comes back last, so that a failed install never counts as done.
.venv/.installed: pyproject.toml | .venv/bin/pip
	rm -f $@
	.venv/bin/pip install -e ".[dev]"
	touch $@
