# The finished environment remembers its own interpreter, so `make test` keeps the Python that `make install` chose.
PYTHON ?= $(if $(wildcard .venv/preceptor.stamp),.venv/bin/python,python3)
BIN := .venv/bin

.PHONY: install demo test chaos check bench

install:
	@$(PYTHON) cluster/install/install.py

demo: install
	@$(BIN)/preceptor demo

test: install
	@$(BIN)/python -m pytest --ignore tests/chaos -m alone --durations 20 --durations-min 5
	@$(BIN)/python -m pytest --ignore tests/chaos -m "not alone" -n 2 --no-loadscope-reorder --durations 40 --durations-min 5

chaos: install
	@$(BIN)/python -m pytest tests/chaos

check: install
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

bench: install
	@$(BIN)/python -m benchmarks
