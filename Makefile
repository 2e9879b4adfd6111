# Everything runs in .venv, made by the first target that needs it; test-oldest and test-pruna make ones of their own.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CONSTRAINTS ?= constraints.txt
INSTALL ?= -e '.[dev]'

.PHONY: demo app test test-slow test-oldest test-pruna pruna-tests pruna-results pruna-speed docs release-check \
	screenshots architecture pictures pipelines tables lint types format install clean

demo: $(INSTALLED)  ## compare on the embedded pipeline: prints a table, writes compare.png
	$(BIN)/tomesd-plus compare --preset quality --preset balanced --preset fast --out compare.png

app: $(INSTALLED)  ## the comparison app, in a browser
	$(BIN)/python -m gradio_app

test: $(INSTALLED)  ## every test but the slow ones, a process on each core
	@$(BIN)/python -m pip show -q pruna 2>/dev/null || \
		echo "Pruna is not installed, so tests/pruna is skipped: make test-pruna"
	$(BIN)/python -m pytest -n logical --dist loadfile -m "not slow"

test-slow: $(INSTALLED)  ## the tests marked slow
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
		echo "No browser, so the tests of the app's page are skipped: apt-get install chromium"
	$(BIN)/python -m pytest -n logical --dist loadfile -m slow

test-oldest:  ## the tests but the slow ones, with the oldest supported versions
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

PRUNA := VENV=.venv-pruna CONSTRAINTS=constraints-pruna.txt INSTALL="-e '.[pruna]' pytest pytest-xdist"

test-pruna:  ## the tests of the plug-in for Pruna, in an environment of its own of 3 GB
	$(MAKE) pruna-tests $(PRUNA)

pruna-tests: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p examples.pruna_torchvision -n logical --dist loadfile tests/pruna

pruna-results:  ## results/pruna.csv anew, in the same environment
	$(MAKE) pruna-speed $(PRUNA)

pruna-speed: $(INSTALLED)
	cd results && PYTHONPATH=.. PRUNA_METRICS_ENABLED=false OMP_NUM_THREADS=1 ../$(BIN)/python -m examples.pruna_speed 6 7

docs: $(INSTALLED)  ## the site, into site/; a warning or a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

release-check: $(INSTALLED)  ## wheel and sdist: built, checked, installed in a fresh environment, run outside the clone
	PYTHON=$(BIN)/python .ci/release-check

pictures: $(INSTALLED)  ## docs/pictures/ and docs/compare.png anew, five minutes of a core
	$(BIN)/python docs/draw_pictures.py
	$(BIN)/python docs/draw_examples.py

tables: $(INSTALLED)  ## the tables of presets in README and docs/figures.md, from results/presets.csv
	$(BIN)/python docs/draw_tables.py

screenshots: $(INSTALLED)  ## docs/app-*.png anew, with a browser
	$(BIN)/python -m gradio_app.screenshots docs

architecture: $(INSTALLED)  ## docs/architecture.svg anew, and lines of code by room
	$(BIN)/python docs/draw_architecture.py

pipelines: $(INSTALLED)  ## docs/pipelines.md anew, from the results of its tests
	$(BIN)/python docs/draw_pipelines.py

lint: $(INSTALLED)  ## style, and the contracts on imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: $(INSTALLED)
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(INSTALLED)

# torch first and pinned: an unpinned torch may bring gigabytes of CUDA libraries
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $$(grep '^torch==' $(CONSTRAINTS))
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) $(INSTALL)
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-pruna build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
