# make quickstart   the whole road on the embedded corpus, with a table at the end (CPU, minutes)
# make test         lint and tests
# make install      only the virtual environment

PYTHON ?= python3
TORCH ?= 2.13.0
VENV ?= .venv

.PHONY: quickstart test install lint clean

quickstart: $(VENV)/.installed
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" bash recipes/quickstart/run.sh

test: $(VENV)/.installed-dev lint
	$(VENV)/bin/python -m pytest

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

install: $(VENV)/.installed

# torch first and exactly: pip would otherwise choose the newest build for the largest GPU
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet "torch==$(TORCH)"
	$(VENV)/bin/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) work
