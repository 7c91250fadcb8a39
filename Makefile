# Everything runs inside .venv; `make test` and `make demo` set it up first.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
FAMILIES := .venv/families

.PHONY: install demo test test-slow check format clean

install: $(INSTALLED)

# PyTorch first, at the tested version: a package that pulls in another one is a mistake.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[onnx,dev]'
	touch $@

# The libraries whose networks the slow tests prune.
$(FAMILIES): $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[timm,torchvision,transformers]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/secateur demo

# Two workers of one thread each: faster than one with two threads, and figures do not depend on thread counts.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal

# What takes minutes: all mutants of the rules, thousands of random networks (another SEED draws others).
SEED ?= 0
test-slow: $(INSTALLED) $(FAMILIES)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow --hypothesis-seed=$(SEED) --numprocesses 2 --dist worksteal

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
