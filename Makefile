# Everything runs inside .venv; `make test` and `make demo` set it up first.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
SLOW := .venv/installed-slow

.PHONY: install demo test test-slow test-thorough browser check format clean

install: $(INSTALLED)

# PyTorch first, at the tested version: a package that pulls in another one is a mistake.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[onnx,dev]'
	touch $@

# Ray, a browser's driver, and the libraries whose networks the slow tests prune.
$(SLOW): $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[slow-tests]'
	touch $@

# Chromium from Debian and axe-core, for the tests of the pages; without them those tests say so and skip.
AXE := .venv/axe/package/axe.min.js
browser: $(AXE)
	command -v chromedriver || (apt-get update --quiet && apt-get install --yes --quiet chromium chromium-driver)

$(AXE): $(INSTALLED)
	mkdir -p .venv/axe
	cd .venv/axe && npm pack --silent axe-core@4.14.1 && tar xzf axe-core-4.14.1.tgz package/axe.min.js

demo: $(INSTALLED)
	$(BIN)/secateur demo

# Two workers of one thread each: faster than one with two threads, and figures do not depend on thread counts.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal

# What takes minutes or more packages: a Ray cluster, killed runs, timm and Hugging Face networks, the leaderboard in a browser.
test-slow: $(SLOW)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow --numprocesses 2 --dist worksteal

# What takes an hour: all mutants of the rules, all types of Hugging Face, and a thousand random networks (another SEED draws others).
SEED ?= 0
test-thorough: $(SLOW)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m thorough --hypothesis-seed=$(SEED) --numprocesses 2 --dist worksteal

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m docs.generate --check

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist
