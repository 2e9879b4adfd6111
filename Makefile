# Everything runs in .venv, made by the first target that needs it.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
CONSTRAINTS ?= constraints.txt

.PHONY: demo test test-fast lint types format install clean

demo: $(INSTALLED)  ## compare on the embedded pipeline: prints a table, writes compare.png
	$(BIN)/tomesd-plus compare --out compare.png

test: $(INSTALLED)  ## every test
	$(BIN)/python -m pytest

test-fast: $(INSTALLED)  ## all but the slow tests
	$(BIN)/python -m pytest -m "not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(INSTALLED)

# torch first and pinned: an unpinned torch may bring gigabytes of CUDA libraries
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check $$(grep '^torch==' $(CONSTRAINTS))
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
