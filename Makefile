# make quickstart   the whole road on the embedded corpus, with a table at the end (CPU, minutes)
# make test         lint and tests
# make bench        speeds on this machine, which should do nothing else meanwhile
# make install      only the virtual environment

PYTHON ?= python3
TORCH ?= 2.13.0
VENV ?= .venv

.PHONY: quickstart test bench install lint clean

quickstart: $(VENV)/.torch-$(TORCH)
	PATH="$(abspath $(VENV))/bin:$$PATH" bash recipes/quickstart/run.sh

test: $(VENV)/.dev-$(TORCH) lint
	$(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

bench: $(VENV)/.torch-$(TORCH)
	$(VENV)/bin/python recipes/bench/bench.py

lint: $(VENV)/.dev-$(TORCH)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

install: $(VENV)/.torch-$(TORCH)

# torch first and exactly: pip would otherwise choose the newest build for the largest GPU
$(VENV)/.torch-$(TORCH): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet "torch==$(TORCH)"
	$(VENV)/bin/python -m pip install --quiet --editable ".[plot]"
	rm -f $(VENV)/.torch-* $(VENV)/.dev-*  # those of another version
	touch $@

$(VENV)/.dev-$(TORCH): $(VENV)/.torch-$(TORCH)
	$(VENV)/bin/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) work
