# Needs make and Python 3.10 or newer with its venv module. Everything else goes into .venv, at the versions of
# constraints.txt; a second run finds it there. It is set up anew when pyproject.toml or constraints.txt change.

PYTHON  ?= python3
VENV    ?= .venv
OLDEST  ?= .venv-oldest
EXTRAS  ?= test,docs,gen,det,seg,stream
WORKERS ?= 2

BIN   := $(VENV)/bin
# An editable install knows the packages of its day: a new one is a new setup.
STAMP := $(VENV)/.ready-$(EXTRAS)-$(words $(wildcard */__init__.py))-packages

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup test gpu-test test-oldest lint docs demo clean

help:
	@echo "make setup   install into $(VENV) (EXTRAS=$(EXTRAS), PYTHON=$(PYTHON))"
	@echo "make test    make lint, then all tests, $(WORKERS) at a time (WORKERS=n)"
	@echo "make gpu-test     the tests that need a GPU; fails where there is none"
	@echo "make test-oldest  all tests with the oldest versions that pyproject.toml allows, in $(OLDEST) (PYTHON=$(PYTHON))"
	@echo "make demo    toy datasets, pretraining, every benchmark and a report, under runs/demo; 13 minutes on two cores"
	@echo "make lint    style, formatting, the contract of imports and types"
	@echo "make docs    the documentation as a website in site/"
	@echo "make clean   remove $(VENV), $(OLDEST) and caches; runs/ stays"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$(PYTHON) is not Python 3.10 or newer; name one that is: make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
	    { echo "no virtual environment: install Python's venv module (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@echo "installing addp[$(EXTRAS)] into $(VENV): some minutes and 6 GB the first time"
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

# One thread a worker: more would only fight over the cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# The tests that `make test` skips without a GPU: the published numbers, and speed. Nothing tested is not a success.
NO_GPU := make gpu-test: PyTorch sees no GPU here, so nothing was tested
gpu-test: $(STAMP)
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "$(NO_GPU)")'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m gpu -n 0

# The same tests with the oldest versions that pyproject.toml allows. They have no release for Python 3.13 or newer.
test-oldest: $(OLDEST)/.ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -p no:cacheprovider -n $(WORKERS) --dist loadfile

# onedl-mmsegmentation asks for numpy 2 without needing it; ftfy and the others after it are its requirements.
$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' || \
	    { echo "the oldest versions need Python 3.10, 3.11 or 3.12; name one: make test-oldest PYTHON=python3.10"; exit 1; }
	@test -x $(OLDEST)/bin/pip || $(PYTHON) -m venv $(OLDEST)
	@echo "installing the oldest versions into $(OLDEST): some minutes and 6 GB the first time"
	@$(OLDEST)/bin/python -m pip install -q -c constraints-oldest.txt -e '.[test,gen,det,onnx,stream]' \
	    onedl-mmcv onedl-mmengine ftfy opencv-python prettytable regex
	@$(OLDEST)/bin/python -m pip install -q -c constraints-oldest.txt --no-deps onedl-mmsegmentation
	@touch $@

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(STAMP)
	$(BIN)/mkdocs build --strict

demo: $(STAMP)
	$(BIN)/addp toy out=runs/demo/toy coco_val=50 ade_val=50 corrupted=10
	$(BIN)/addp bench demo bench.only=pretrain  # one run, which takes both cores
	OMP_NUM_THREADS=1 $(BIN)/addp bench demo  # two runs at a time, a core each
	@echo
	@echo "The report: $(CURDIR)/runs/demo/bench/report.html"
	@echo "Next, with your own images: . $(BIN)/activate"
	@echo "  addp pretrain tiny data=path/to/photos out=runs/tiny     # 25 minutes; the same command continues a stopped run"
	@echo "  addp generate model=runs/tiny out=runs/tiny/generated n=64"
	@echo "  addp --help                                              # all commands; docs/getting-started.md explains them"

clean:
	rm -rf $(VENV) $(OLDEST) build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
