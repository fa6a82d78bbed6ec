.DEFAULT_GOAL := help
UV ?= $(shell command -v uv 2>/dev/null || echo .venv/bin/uv)
RUN := .venv/bin/
TARGET ?= history

.PHONY: help install demo test lint bench

help: ## Show what each target does
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/.installed ## Make .venv from uv.lock (brings uv itself where it is missing)

.venv/.installed: pyproject.toml uv.lock
	@command -v uv >/dev/null || [ -x .venv/bin/uv ] || { python3 -m venv .venv && .venv/bin/pip install --quiet uv; }
	$(UV) sync --locked --inexact
	@infra/install-system-libraries
	@touch $@

demo: install ## From raw transactions to a served fraud score, in one command
	$(RUN)isochron demo --folder demo --report demo/report.json

test: install lint ## Every check: lint, types, import contract, tests
	$(RUN)pytest -n 2 --dist loadfile

lint: install ## Style, types and the import contract
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy
	$(RUN)lint-imports

bench: install ## Measure against Feast and code written by hand: make bench TARGET=history OPTIONS="--scale 0.01"
	$(UV) sync --group bench --inexact --locked
	$(RUN)python -m benchmarks.$(TARGET) $(OPTIONS)
