# `make demo`, `make test` and `make lint` install all they need into .venv and run. TORCH chooses the build of torch.
VENV   ?= .venv
PYTHON ?= python3
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: demo test lint matrix clean

demo: $(VENV)/.installed
	$(BIN)/easyedit-mdm demo --out demo

test: $(VENV)/.tested
	$(BIN)/python -m pytest

lint: $(VENV)/.tested # style of everything, types of the package; both are configured in pyproject.toml
	$(BIN)/ruff check .
	$(BIN)/mypy

matrix: # the oldest and the middle versions of transformers, each in an environment of its own
	tests/matrix.sh

# torch first and by itself: whatever else asks for torch then finds it there
$(VENV)/.installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "$(TORCH)"
	$(PIP) install -e .
	$(PIP) install --no-deps easyeditor==0.0.1.dev0
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(PIP) install -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo
