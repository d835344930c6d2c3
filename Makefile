# make quickstart   train the embedded default on real sound and compare it with the untrained model
# make test         what CI runs; make lint, make docs, make parity: see CONTRIBUTING.md
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PLUGINS := $(sort $(wildcard plugins/*))
QUICKSTART := examples/quickstart

.PHONY: quickstart test lint docs parity setup weights clean

quickstart: setup weights
	$(BIN)/coatkit train $(QUICKSTART)/spec.yaml --resume
	$(BIN)/python $(QUICKSTART)/compare.py $(QUICKSTART)/runs/quickstart $(QUICKSTART)/heldout.jsonl

test: setup weights
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs:
	@echo "The documentation is the Markdown in docs/; the site comes with the documentation issue."

# Compare the basic-pitch network with the upstream package, in an environment of its own.
parity: setup
	$(PYTHON) -m venv .parity
	.parity/bin/python -m pip install -q -r tests/parity/requirements-basic-pitch.txt
	.parity/bin/python -m pip install -q --no-deps basic-pitch==0.4.0
	.parity/bin/python tests/parity/basic_pitch.py dump .parity/basic_pitch.npz
	$(BIN)/python tests/parity/basic_pitch.py compare .parity/basic_pitch.npz

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt $(wildcard plugins/*/pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "coatkit needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt -e .[dev] $(PLUGINS:%=-e ./%)
	touch $@

weights: setup
	$(BIN)/coatkit fetch mini

clean:
	rm -rf $(VENV) .parity build dist *.egg-info plugins/*/src/*.egg-info
