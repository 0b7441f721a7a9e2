# Each target sets up everything it needs in .venv first; `make PYTHON=python3.12` takes another one.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: test demo acceptance

# Style, types, the store's engine (made once), and every test that is not a long campaign.
test: $(INSTALLED)
	ruff check .
	ruff format --check .
	mypy
	python -m p2p.aggregate.engine.build
	pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not acceptance'

# Trains digits on functions that live for 15 s, kills one, and compares with an undisturbed run.
demo: $(INSTALLED)
	python examples/demo.py

# Long matrices of faults on real processes, and a campaign of random schedules in the simulator.
acceptance: $(INSTALLED)
	python -m p2p.aggregate.engine.build
	pytest -n 2 --dist load -m 'acceptance and not alone'
	pytest -m 'acceptance and alone'
	python -m chaos simulate --seeds 5000

$(INSTALLED): pyproject.toml constraints.txt p2p/collectives/_int8.c
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev,examples]'
	touch $@
