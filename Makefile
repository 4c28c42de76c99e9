# Two commands do everything, the virtual environment included:
#   make quickstart   the main experiment: report at runs/shrink/report.html
#   make test         lint, types and the whole test suite
# Another interpreter: make test PYTHON=python3.12. Another number of tests at once (cores, up to 4): make test WORKERS=1

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n : 4)))
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONDONTWRITEBYTECODE  # each of the tests' hundreds of processes would compile all sources anew

# Tests that compare processes, each with the seeds as they are.
PROCESSES := $(addprefix tests/,test_multiprocess.py test_resume.py)

.PHONY: quickstart test rounding lint types bench lock clean

quickstart: $(VENV)/ready
	$(BIN)/python -m experiments.shrink

test: $(VENV)/ready-test $(VENV)/ready-aot lint types
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --max-worker-restart=0 --durations=20 tests

# What holds by the luck of one draw, or of how one machine rounds, fails here: other seeds, and products without FMA.
rounding: $(VENV)/ready-test
	SLM_TESTS_SEEDS=1000 XLA_FLAGS=--xla_cpu_max_isa=SSE4_2 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile \
	  $(addprefix tests/,ablate data distill experiments interop model prune) $(filter-out $(PROCESSES),$(wildcard tests/test_*.py))

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

# The TPU compiler lies beside the environment's packages, where only the tests of launch.aot look for it: at every start of JAX
# it would say that there is no TPU. Its wheel is for Linux on x86_64; elsewhere those tests skip.
$(VENV)/ready-aot: $(VENV)/ready requirements-aot.lock
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then set -x; \
	  $(BIN)/python -m pip install --quiet --upgrade --target $(VENV)/aot --no-deps -r requirements-aot.lock; fi
	@touch $@

# The locks hold for Python 3.11 to 3.13 (environment markers choose; jax 0.10 is the last for 3.11).
lock:
	uv pip compile --quiet --universal --no-header --python-version 3.11 requirements.txt -o requirements.lock
	uv pip compile --quiet --universal --no-header --python-version 3.11 pyproject.toml --extra test -c requirements.lock -o requirements-test.lock
	uv pip compile --quiet --universal --no-header --no-annotate --python-version 3.11 pyproject.toml --extra aot -c requirements.lock | \
	  grep ^libtpu > requirements-aot.lock

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .mypy_cache
