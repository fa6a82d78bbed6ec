.DEFAULT_GOAL := help
UV ?= $(shell command -v uv 2>/dev/null || echo .venv/bin/uv)
RUN := .venv/bin/
TARGET ?= history
REDIS_PORT ?= 6379

.PHONY: help install demo test lint bench redis-up redis-down

help: ## Show what each target does
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/.installed ## Make .venv from uv.lock (brings uv itself where it is missing)

.venv/.installed: pyproject.toml uv.lock infra/install-system-libraries
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

redis-up: install ## Start a Redis for development on 127.0.0.1 (REDIS_PORT, 6379), data in data/redis
	@$(RUN)python -m infra.redis.development up --port $(REDIS_PORT)

redis-down: ## Stop it; its data stays
	@$(RUN)python -m infra.redis.development down --port $(REDIS_PORT)
