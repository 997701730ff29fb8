# `make demo` and `make test` set up .venv first; PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint format docs clean

demo: $(VENV)/installed
	$(BIN)/python -P -m launcher.demo

test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/installed
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

# torch first and pinned: without it, pip would choose a newer build for the other packages' sake.
# DeepSpeed builds against the torch that is there.
$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch setuptools
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation deepspeed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[deepspeed,fast,lora,s3,test,lint,docs]'
	touch $@

clean:
	rm -rf $(VENV) demo build docs/_build *.egg-info
