# Everything needed for the two commands of the README: `make quickstart` and `make test`.
#
#   PYTHON      the interpreter that makes .venv (3.10 to 3.13)
#   ORT         cpu or gpu: which ONNX Runtime to install; never both
#   LONG        1: `make benchmarks` makes again what takes hours, too
#   PIP_EXTRA   more options for the installer, e.g. an index with CPU builds of torch:
#               make quickstart PIP_EXTRA="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
ORT ?= cpu
PIP_EXTRA ?=
VENV ?= .venv
BIN := $(VENV)/bin

INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: quickstart test check benchmarks install clean

quickstart: $(VENV)/.installed
	$(BIN)/distillabse run quickstart

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist loadfile

benchmarks: $(VENV)/.installed
	$(BIN)/python benchmarks/every.py $(if $(LONG),--long)

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (two minutes on a fast network; once)"
	$(INSTALL) --constraint constraints.txt $(PIP_EXTRA) torch==2.13.0 --editable '.[$(ORT),demo,deepspeed,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
