.PHONY: quickstart test test-long clean

PYTHON ?= python3
VENV := .venv/bin

# One stamp per set of extras, renewed when pyproject.toml changes: a second `make` installs nothing.
.venv/.quickstart: pyproject.toml
	test -x $(VENV)/python || $(PYTHON) -m venv .venv
	$(VENV)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/.dev: pyproject.toml
	test -x $(VENV)/python || $(PYTHON) -m venv .venv
	$(VENV)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@ .venv/.quickstart

quickstart: .venv/.quickstart
	$(VENV)/python -m qwenft.quickstart $(ARGS)

# Two workers of one thread each: more threads on two cores slow small kernels down. Each begins with a half of the
# tests, so that what a module makes for its tests is seldom made twice.
test: export OMP_NUM_THREADS = 1
test: .venv/.dev
	$(VENV)/pre-commit run --all-files --show-diff-on-failure
	$(VENV)/python -m pytest -n 2 --dist worksteal -m "not long" tests
	$(VENV)/python -m pytest --doctest-modules qwenft

test-long: export OMP_NUM_THREADS = 1
test-long: .venv/.dev
	$(VENV)/python -m pytest -n 2 --dist worksteal -m long tests

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
