# Every target does its own set-up: all that has to be here is Python 3.11+, make and Java 17+.
PYTHON ?= python3
BIN    := .venv/bin
READY  := .venv/.ready
CONFIG ?= conf/quickstart.yaml
# Images of containers often set it: then each process compiles all of sparknorm again, 2 of its 9 seconds of imports.
export PYTHONDONTWRITEBYTECODE :=
INSTALL = $(BIN)/pip install --disable-pip-version-check --no-input --progress-bar off --constraint conf/constraints.txt --editable '.[dev]'

.DEFAULT_GOAL := help
.PHONY: help setup run ui check test test-all ui-test gpu-test gpu-bench bench bench-peers docs dist clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## a virtual environment in .venv with the tested packages; checks Python and Java

$(READY): setup.cfg pyproject.toml conf/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "sparknorm needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0])'
	@$(PYTHON) -m pipeline.java
	@echo "Installing the tested packages into .venv: about $$(grep -c == conf/constraints.txt) of them, minutes on a new machine."
	@$(PYTHON) -m venv .venv
	@$(INSTALL) > .venv/install.log 2>&1 & pid=$$!; seconds=0; \
	while kill -0 $$pid 2> /dev/null; do \
	    sleep 1; seconds=$$((seconds + 1)); \
	    [ $$((seconds % 15)) -ne 0 ] || echo "  $$seconds s: $$(grep -c '^ *Collecting ' .venv/install.log) packages found, the last $$(sed -n 's/^ *Collecting \([^][ =<>~!(;]*\).*/\1/p' .venv/install.log | tail -n 1)$$(sed -n 's/^Installing collected.*/, now unpacking them/p' .venv/install.log)"; \
	done; \
	wait $$pid || { tail -n 15 .venv/install.log; echo "error: the packages could not be installed; .venv/install.log has all that pip said" >&2; exit 1; }
	@echo "Installed; the log is .venv/install.log."
	@touch $(READY)

run: setup ## the main job: ingest Fashion-MNIST, train without and with batch norm, compare (CONFIG=conf/X.yaml for another)
	$(BIN)/python -m pipeline ingest -c $(CONFIG)
	$(BIN)/python -m pipeline compare -c $(CONFIG)

ui: setup ## the MLflow UI on the runs, at http://127.0.0.1:5000
	$(BIN)/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db --host 127.0.0.1 --port 5000

check: setup docs ## lint, types, who may import whom, and whether the documentation can be built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Three processes on two cores, since many tests wait: for a stall to be noticed, a lease to end. One thread each: with a
# thread for each core they would wait for each other, and small networks became 20 times as slow.
test: setup dist ## all tests but the slow ones; what CI runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m 'not slow'

# The slow ones in one process: they kill, cut off and wait, and their bounds are in seconds.
test-all: test ## all tests: first those of `make test`, then the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

ui-test: setup ## look at the MLflow UI and the report of `make run` in a headless Chromium; pictures in runs/screenshots
	SPARKNORM_UI_RUNS=runs $(BIN)/python -m pytest -m ui

# No set-up: a GPU machine brings its own Python with a torch built for CUDA, and needs neither Java nor Spark.
gpu-test: ## tests/cuda, which needs torch, numpy, pyarrow, fsspec, pydantic, PyYAML, Pillow and pytest (PYTHON=the one that has them)
	$(PYTHON) -m pytest tests/cuda

gpu-bench: ## make bench PART=gpu without a set-up, on such a machine
	PYTHONPATH=. $(PYTHON) tests/bench/gpu.py
	PYTHONPATH=. $(PYTHON) tests/bench/gpu_norms.py

bench: setup ## loading, ingest, training and norms against their peers, about an hour (PART=loader, jpeg, ingest, cold, scale with ranks and manifest, training, study, norms, gpu, verdicts, requests, finetune, score or tune)
	$(BIN)/python tests/bench/run.py $(PART)

# An environment of their own, since they pin other versions of what sparknorm uses. With it, PART=jpeg and PART=ingest have peers.
bench-peers: .venv-peers/.ready ## reading and ingest of photographs against WebDataset, mosaicml-streaming, LitData and torch, in .venv-peers
	$(MAKE) bench PART='jpeg ingest'

.venv-peers/.ready: tests/bench/peers/requirements.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --disable-pip-version-check --no-input --progress-bar off --requirement tests/bench/peers/requirements.txt > .venv-peers/install.log
	@touch $@

docs: setup ## the documentation as a site: docs/_build/index.html
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build

dist: dist/sparknorm.zip ## the wheel, and the zip for spark-submit --py-files

dist/sparknorm.zip: $(READY) $(shell find pipeline models -type f -not -name '*.pyc') README.md
	@rm -rf dist build
	$(BIN)/python -m build --wheel --outdir dist . > /dev/null
	cp dist/sparknorm-*.whl dist/sparknorm.zip

clean: ## delete what the commands left, but for .venv
	rm -rf runs dist build *.egg-info .pytest_cache .mypy_cache .ruff_cache
