# The finished environment remembers its own interpreter, so `make test` keeps the Python that `make install` chose.
PYTHON ?= $(if $(wildcard .venv/preceptor.stamp),.venv/bin/python,python3)
BIN := .venv/bin
# Processes that run tests. One more than two cores: a test often waits for processes that start one after the other.
TESTERS ?= 3

.PHONY: install demo test test-all chaos check bench docs

# What every process would compile anew is compiled once. The scheduler (tests/xdist_scheduler.py) keeps its own order.
define run-tests
@$(BIN)/python -m compileall -q cluster learner rollout_workers teacher_workers
@$(BIN)/python -m pytest --ignore tests/chaos $(1) -n $(TESTERS) --no-loadscope-reorder --durations 40 --durations-min 5
endef

install:
	@$(PYTHON) cluster/install/install.py

demo: install
	@$(BIN)/preceptor demo

test: install
	$(call run-tests,-m "not exhaustive")

test-all: install
	$(call run-tests)
	@$(BIN)/python -m pytest tests/chaos

chaos: install
	@$(BIN)/python -m pytest tests/chaos

check: install
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

bench: install
	@$(BIN)/python -m benchmarks

# The site's tools have an environment of their own: none of them is in the locks.
docs:
	@$(PYTHON) -m venv build/docs
	@build/docs/bin/python -m pip install --quiet --disable-pip-version-check "pip>=25.1"
	@build/docs/bin/python -m pip install --quiet --disable-pip-version-check --group docs
	@build/docs/bin/sphinx-build --fail-on-warning --keep-going --quiet docs build/site
	@echo "build/site/index.html"
