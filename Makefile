PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test check bench mutants

train: .venv/installed  ## Fine-tune and evaluate Open-VCLIP on the built-in miniature; ARGS="..." overrides the recipe
	$(BIN)/python -m applications.openvclip.train $(ARGS)

test: .venv/installed  ## Run every test
	$(BIN)/python -m pytest $(ARGS)

check: .venv/installed  ## Lint, formatting, types, import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: .venv/installed  ## Run every benchmark; results go to benchmarks/results
	set -e; for script in $(filter-out benchmarks/measuring.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$script; done

mutants: .venv/installed  ## Break the library one line at a time and see the tests fail
	$(BIN)/python tests/mutants.py $(ARGS)

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e '.[openvclip,dev]'
	touch $@
