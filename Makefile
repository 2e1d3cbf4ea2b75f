PYTHON ?= python3
OLDEST ?= python3.10
BIN := .venv/bin

.PHONY: train demo test test-all test-oldest check docs bench gpu-check mutants

train: .venv/installed  ## Fine-tune and evaluate Open-VCLIP on the built-in miniature; ARGS="..." overrides the recipe
	$(BIN)/python -m applications.openvclip.train $(ARGS)

demo: .venv/installed  ## Serve the newest run on a page of this machine; where there is none, train the miniature first
	test -n "$(wildcard runs/*/results.json)" || $(BIN)/python -m applications.openvclip.train
	$(BIN)/python -m applications.openvclip serve $(ARGS)

test: .venv/installed  ## Run the tests, a process for each core; what takes long is left to test-all
	$(BIN)/python -m pytest -n auto --dist loadfile -m 'not slow' $(ARGS)

test-all: test  ## Run every test: other libraries' models and trainers, kills, a whole run of the miniature
	$(BIN)/python -m pytest -n auto --dist loadfile -m slow $(ARGS)

test-oldest: ## The quick tests with the oldest Python and torch that are supported, in .venv-oldest
	test -x .venv-oldest/bin/python || $(OLDEST) -m venv --upgrade-deps .venv-oldest  # an old pip looks for versions for an hour
	.venv-oldest/bin/python -m pip install -q -e '.[openvclip,dev]' 'torch==2.9.*' 'torchvision==0.24.*'
	.venv-oldest/bin/python -m pytest -n auto --dist loadfile -m 'not slow' $(ARGS)

docs: .venv/installed  ## Build the pages as a site, in docs/_build/html; notebooks are run, warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs docs/_build/html $(ARGS)

check: .venv/installed  ## Lint, formatting, types, import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: .venv/installed  ## Run every benchmark; results go to benchmarks/results
	set -e; for script in $(filter-out benchmarks/measuring.py benchmarks/quoted.py benchmarks/costs.py benchmarks/gpu_check.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$script; done

gpu-check: .venv/installed  ## What has to be known of GPUs: distributed tests, memory, speed; without one, scaled down
	$(BIN)/python benchmarks/gpu_check.py

mutants: .venv/installed  ## Break the library one line at a time and see the tests fail
	$(BIN)/python tests/mutants.py $(ARGS)

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e '.[openvclip,dev,docs]'
	touch $@
