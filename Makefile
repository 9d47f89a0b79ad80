# Everything that a newcomer or a developer types. All of it needs only python3 (3.11 or newer) and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: demo serve test check bench docs slow clean

demo: $(VENV)/.demo
	$(BIN)/sumuk demo

serve: $(VENV)/.serve
	$(BIN)/sumuk serve

# Two at once take half of the time; more would want more memory than a laptop has.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=logical --maxprocesses=4 --dist=loadfile

slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/generate.py

docs: $(VENV)/.dev
	$(BIN)/python -m benchmarks.miniature
	$(BIN)/python -m benchmarks.solver_table > docs/solvers.md
	$(BIN)/python -m benchmarks.flops
	$(BIN)/python -m benchmarks.parity

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e .
	touch $@

$(VENV)/.serve: $(VENV)/.demo
	$(PIP) install -c constraints.txt -e '.[ui]'
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(PIP) install --no-deps k-diffusion==0.1.1.post1
	touch $@

clean:
	rm -rf $(VENV) build dist
