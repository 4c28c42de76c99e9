# Two commands do everything, the virtual environment included:
#   make quickstart   the main experiment: report at runs/shrink/report.html
#   make test         lint, types and the whole test suite
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: quickstart test lint types bench lock clean

quickstart: $(VENV)/ready
	$(BIN)/python -m experiments.shrink

test: $(VENV)/ready-test lint types
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests

lint: $(VENV)/ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/ready-test
	$(BIN)/mypy

bench: $(VENV)/ready-test
	$(BIN)/python -m experiments.bench_step
	$(BIN)/python -m experiments.bench_parts

$(VENV)/ready: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: slm_jax needs Python >= 3.11, and $(PYTHON) is $$($(PYTHON) --version 2>&1); try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "error: cannot make a virtual environment; on Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet -r requirements.lock
	@touch $@

$(VENV)/ready-test: $(VENV)/ready requirements-test.lock
	$(BIN)/python -m pip install --quiet -r requirements-test.lock torch==2.13.0
	@touch $@

# The locks hold for Python 3.11 to 3.13 (environment markers choose; jax 0.10 is the last for 3.11).
lock:
	uv pip compile --quiet --universal --no-header --python-version 3.11 requirements.txt -o requirements.lock
	uv pip compile --quiet --universal --no-header --python-version 3.11 pyproject.toml --extra test -c requirements.lock -o requirements-test.lock

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .mypy_cache
