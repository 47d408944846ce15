# The daily commands. `make` alone lists them; each prepares `.venv` first if need be.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
LOCKS  := requirements.lock requirements-dev.lock
UV     := $(shell command -v uv 2>/dev/null)
# uv when present, pip otherwise; torch always through pip (uv overlooks CPU wheels in a wheel folder)
ifneq ($(UV),)
INSTALL := $(UV) pip install --quiet --python $(BIN)/python
else
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
endif
export DVC_NO_ANALYTICS := 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup loop test validity ablate bench lab lock

help: ## list the commands
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12 | sed 's/^/make /'

setup: $(STAMP) ## make .venv and install what the locks name; a second call does nothing

$(STAMP): $(LOCKS) settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'error: $(PYTHON) is older than 3.11; the project needs 3.11 or newer; name one with make PYTHON=python3.11' >&2; exit 1; }
	@test -x $(BIN)/python || { echo 'making $(VENV)'; $(PYTHON) -m venv $(VENV); }
	@echo 'installing what the locks name'
	@$(BIN)/python -c 'import importlib.metadata as m, sys; sys.exit(not ("$(TORCH)".split("==")[-1] == m.version("torch").split("+")[0]))' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(TORCH)
	@$(INSTALL) --require-hashes --no-deps $(addprefix -r ,$(LOCKS))
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@$(INSTALL) --no-deps --no-build-isolation -e .
	@if test -d .git; then $(BIN)/nbdev_install_hooks >/dev/null 2>&1 || true; fi
	@touch $@

loop: setup ## telemetry in, report out: simulate if data/ is missing, then run the pipeline
	@$(BIN)/telemetry-loop simulate --if-missing
	@$(BIN)/dvc repro
	@$(BIN)/telemetry-loop status
	@echo 'report: artifacts/reports/index.html'

test: setup ## every test: chapters, architecture, pipeline, truth; Spark's where there is Java
	@if command -v java >/dev/null; then $(INSTALL) --require-hashes --no-deps -r requirements-spark.lock; fi
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile

validity: setup ## the full study of estimates against the simulator's truth
	@$(BIN)/python tests/validity/study.py

ablate: setup ## what each part of the recommender earns, from all people and passes; the pipeline asks a subsample
	@$(BIN)/telemetry-loop train --variant all --whole

bench: setup ## times and ratios against peers, measured in one run
	@$(INSTALL) --require-hashes --no-deps -r requirements-bench.lock
	@$(BIN)/python benchmarks/run.py

lab: setup ## open the chapters in JupyterLab
	@$(BIN)/jupyter lab nbs

lock: ## resolve settings.ini again into the lock files (needs uv)
	@for extra in '' dev spark bench; do \
	  out=requirements$${extra:+-$$extra}.lock; tmp=$$(mktemp -d); test ! -f $$out || cp $$out $$tmp/all.lock; \
	  $(UV) pip compile --quiet pyproject.toml $${extra:+--extra $$extra -c requirements.lock} --python-version 3.11 --generate-hashes \
	    --no-header --no-annotate --no-emit-index-url -o $$tmp/all.lock && \
	  awk -v base="$${extra:+requirements.lock}" 'BEGIN {while (base && (getline line < base) > 0) if (line ~ /^[a-z0-9]/) {split(line, w, "=="); have[w[1]]=1}} \
	    /^[a-z0-9]/ {split($$0, w, "=="); keep = !(w[1] in have) && (w[1] == "nvidia-ml-py" || w[1] !~ /^(torch|triton|cuda-.*|nvidia-.*)$$/)} keep' $$tmp/all.lock > $$out; \
	  rm -r $$tmp; echo "$$out: $$(grep -c '==' $$out) packages"; done
