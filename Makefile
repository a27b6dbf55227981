# Each target does its own set-up: `make quickstart` on a fresh machine is enough.
PYTHON ?= python3
VENV := .venv
export OMP_WAIT_POLICY ?= PASSIVE
RUN := $(VENV)/bin/python

.PHONY: browser setup quickstart test test-slow bench lint

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 10) <= v < (3, 14) else f"Python {v[0]}.{v[1]} is not supported; take 3.10 to 3.13, e.g. make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -r requirements.txt
	@touch $@
	@echo "ready; now: . $(VENV)/bin/activate"

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	@touch $@

quickstart: setup
	$(RUN) run.py --method PrivImage --data_name digits_8 --epsilon 10

# One process per core; a few tests start processes of their own. The tests of a module share a process, so that what
# a module prepares for all of them, such as the toy runs, is prepared once.
test: $(VENV)/.installed-dev
	$(RUN) -m pytest -n auto --maxprocesses 8 --dist loadscope

test-slow: $(VENV)/.installed-dev
	$(RUN) -m pytest -m slow

bench: setup
	$(RUN) scripts/benchmarks/bench_dpsgd.py

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# For the test that opens report.html, which is skipped without Chromium.
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq && \
		apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1 || echo "no chromium: the page's test is skipped"
