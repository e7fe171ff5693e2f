PYTHON ?= python3
BIN := .venv/bin

# a process for each of two cores; what is imported is compiled once, whatever the shell says
TESTING := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= PYTEST_DISABLE_PLUGIN_AUTOLOAD=1

# tests that are passed over where a heavy or rare package is missing
EXTRAS := tests/test_trackers_real.py tests/test_quantize.py tests/test_demo.py tests/rewards/test_judge_real.py tests/test_site.py

.PHONY: train test test-extras check docs clean

train: .venv/installed  ## the first run: train the playground and write its report
	$(BIN)/flowtilt train playground-fast

test: .venv/installed  ## the whole suite
	$(TESTING) $(BIN)/python -m pytest -p xdist.plugin -n 2 --dist loadscope --no-loadscope-reorder

test-extras: .venv/extras-installed  ## against the real trackers, gradio, torchao and a real judge's server
	$(TESTING) $(BIN)/python -m pytest -p xdist.plugin -n 2 --dist loadscope $(EXTRAS)

check: .venv/installed  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

docs: .venv/docs-installed  ## the site, in build/site; it opens from disk
	$(BIN)/python docs/tools/site_builder.py

.venv/docs-installed: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

.venv/extras-installed: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev-all]'
	touch $@

clean:
	rm -rf .venv build dist
