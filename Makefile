# make demo | test | check | compat | gpu | audit | fix | clean. Each makes .venv by itself.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test check compat gpu audit fix clean
.DEFAULT_GOAL := demo

# torch by itself first: CPU machines take the pinned build, and nothing later may replace it
$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "making $(VENV), once: PyTorch and the libraries take a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,tensorboard]'
	touch $@

# two threads: a step of the embedded base takes 0.75 of one thread's time on two cores
demo: export OMP_NUM_THREADS ?= 2
demo: $(VENV)/.ready
	$(BIN)/sd-lora demo --output_dir demo_output

# two processes, and a thread each: on busy cores, threads wait for one another
test compat gpu: export OMP_NUM_THREADS ?= 1
test: $(VENV)/.ready
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=12

check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# the wheel, and the oldest versions that pyproject.toml allows: about three minutes
compat: $(VENV)/.ready
	bash .ci/wheel
	bash .ci/floors

# tests and measurements that need a GPU; after two and a half minutes no part begins. Results in gpu_output
gpu: $(VENV)/.ready
	$(BIN)/python -m pytest -q -m gpu; failed=$$?; \
	$(BIN)/python benchmarks/gpu.py --out gpu_output --seconds 150 && exit $$failed

# published vulnerabilities of the pinned libraries; asks PyPI
audit: $(VENV)/.ready
	$(BIN)/pip install --quiet pip-audit
	$(BIN)/pip-audit -r constraints.txt --no-deps --disable-pip

fix: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo_output gpu_output .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
