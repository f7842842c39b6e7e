# Two commands do everything: `make demo` and `make test`. Both install what they need into .venv, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := quickstart
RUN := runs/$(DEMO)

# Where the environment forbids Python's bytecode cache, importing torch takes half a minute every time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test lint format install clean

help:
	@echo "make demo     search, retrain, compare and report on an embedded dataset (config $(DEMO))"
	@echo "make test     run the tests"
	@echo "make lint     check style and types"
	@echo "make format   format the code"
	@echo "make clean    remove .venv (runs stay)"
	@echo "PYTHON=python3.12 chooses the interpreter; UV_TORCH_BACKEND=cpu installs torch without CUDA."

demo: install
	@if [ -e $(RUN)/run.json ]; then $(BIN)/ftnas run --resume $(RUN); else $(BIN)/ftnas run $(DEMO); fi

test: install
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p ftnas

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is missing; install Python 3.11 or newer, or say PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version); say PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) cannot make virtual environments; on Debian: apt install python3-venv"; exit 1; }
	@test -x $(BIN)/uv || { $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet --disable-pip-version-check uv; }
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV)
