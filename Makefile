# Each target sets up .venv by itself; nothing else has to be installed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test slow check audit clean

demo: .venv/installed ## the whole method on the embedded model and texts, in minutes on two cores
	$(BIN)/python -m dive.train

test: .venv/installed-dev ## everything but the slow tests, in two processes of one thread each
	$(BIN)/python -m pytest -n 2 --dist loadfile

slow: .venv/installed-dev ## the tests that take minutes each
	$(BIN)/python -m pytest -m slow

check: .venv/installed-dev ## what CI checks beside the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy dive

audit: .venv/installed-dev ## known faults of the installed packages; asks the package index
	$(BIN)/python -m pip install --quiet 'pip-audit>=2.7'
	$(BIN)/pip-audit --progress-spinner off --timeout 10

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/installed-dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv outputs/store outputs/20* outputs/multirun
