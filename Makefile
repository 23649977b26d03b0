# `make` alone lists the targets. Each one makes the virtual environment first if it is missing or out of date.
# Overridable: VENV (folder of the environment), PYTHON (interpreter that makes it), OUT (where `make run` writes),
# NB (one notebook for `make notebooks`), DEVICE (where `make lab` computes), ARGS (more options for pytest).

VENV ?= .venv
OUT  ?= results
NB   ?=
ARGS ?=
DEVICE ?= auto
BIN   = $(VENV)/bin
READY = $(VENV)/.itemkit-ready

# the first interpreter that starts and is new enough; the pins were tested with 3.11
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.DEFAULT_GOAL := help
.PHONY: help run test notebooks figures lab lab-check lint check-notebooks check-readme bench-gpu wheels clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | \
		awk -F ':.*## *' '{printf "  make %-16s %s\n", $$1, $$2}'

run: $(READY)  ## the whole method on the mini preset: features, heads, notebooks, figures into results/
	$(BIN)/itemkit run --out $(OUT)

# one thread per process: the processes already share the cores
test: $(READY)  ## the tests (minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -ra -n auto --maxprocesses 4 $(ARGS)

notebooks: $(READY)  ## execute the notebooks in place and stamp them: the only writer of committed outputs
	$(BIN)/python -m tools.notebooks write $(NB)

figures: $(READY)  ## every figure and table of a paper from what the notebooks stored in results/, no model run
	cd notebooks && $(abspath $(BIN))/python -m papermill --no-progress-bar 12_paper_figures.ipynb \
		$(abspath $(OUT))/notebooks/12_paper_figures.ipynb -p OUT_DIR $(abspath $(OUT))
	@echo "Figures, tables and manifest.json are in $(OUT)/paper."

# features of the old models must not be met with the new ones: the detector's are computed anew, in a folder apart
lab: $(READY)  ## rebuild the mini laboratory from nothing: every model and every fake image (hours on a CPU)
	$(BIN)/python -m minilab build --device $(DEVICE)
	rm -rf build/lab/detector
	$(BIN)/python -m minilab detector --out build/lab/detector --device $(DEVICE)
	$(BIN)/python -m minilab build cards
	@echo "The models are new. What earlier runs left in $(OUT)/ was made with the old ones: remove it (make clean)."

lab-check: $(READY)  ## verify the laboratory's hashes and measure its key figures again
	$(BIN)/python -m minilab check

lint: $(READY)  ## ruff on modules and notebooks, types, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

check-notebooks: $(READY)  ## execute every notebook into a temporary folder and check what comes out
	$(BIN)/python -m pytest -q -ra -m notebooks $(ARGS)

check-readme: $(READY)  ## run every command and every line of Python that README.md shows
	$(BIN)/python -m pytest -q -ra -m readme $(ARGS)

bench-gpu: $(READY)  ## prove and time the GPU path in eight minutes, into build/gpu
	$(BIN)/python -m benchmarks.gpu --out build/gpu

wheels: $(READY)  ## what a machine with a GPU and no network lacks, as stripped wheels in build/wheels
	$(BIN)/python -m tools.wheels

# build/ stays: it holds the checkpoints of a laboratory in training
clean:  ## remove results and caches; keeps the environment, data/, build/ and the committed notebooks
	rm -rf $(OUT) .pytest_cache .ruff_cache .mypy_cache .import_linter_cache dist
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

$(READY): constraints.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python of version 3.11 or newer found. Install one, or name it:" \
		"make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || { echo "Making the environment in $(VENV) with $(PYTHON); this happens once."; \
		$(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,explore]'
	@touch $@
