# make demo: the whole path, from portraits to a report.     make demo-scratch: trains from nothing.
# make test, make test-fast, make test-slow, make coverage, make lint.  Each builds .venv first if it is missing.
# Another Python: make PYTHON=python3.12 demo.  PyTorch of PyPI, with CUDA: make TORCH_INDEX= demo.

PYTHON ?= python3
TORCH = torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TEST_PROCESSES ?= 2
BIN = .venv/bin
PIP = $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --no-compile

.PHONY: demo demo-scratch test test-fast test-slow coverage lint miniature clean

demo: .venv/installed
	$(BIN)/python demo.py

demo-scratch: .venv/installed
	$(BIN)/python demo.py --scratch

# The heavy files come first (tests/conftest.py), so that no process waits long for the last. The
# libraries' bytecode is kept whatever the environment says: compiling it is half of an import.
PYTEST = PYTHONDONTWRITEBYTECODE= JAX_PLATFORMS=cpu $(BIN)/python -m pytest
TOGETHER = -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test: .venv/installed
	$(PYTEST) -m "not slow" $(TOGETHER)

# Before a commit: leaves out what trains, draws pictures or portraits, compares with the peers'
# models, converts whole bases or starts programs (the files marked heavy). Only `make test` proves
# those.
test-fast: .venv/installed
	$(PYTEST) -m "not slow and not heavy" $(TOGETHER)

# One after the other: some take half an hour and 16 GB.
test-slow: .venv/installed
	$(PYTEST) -m slow

# What `make test` runs of the source, in lines: by hand, for it takes a third longer.
coverage: .venv/installed
	$(PYTEST) -m "not slow" $(TOGETHER) --cov --cov-report=term

# Compiles for TPUs and GPUs that are not here, with their compilers (5 GB), in an own environment.
test-accelerators: .venv-accelerators/installed
	JAX_PLATFORMS=cpu .venv-accelerators/bin/python -m pytest tests/accelerators tests/train/plan

.venv-accelerators/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-accelerators
	.venv-accelerators/bin/python -m pip install --disable-pip-version-check --progress-bar off \
	  --no-compile -c constraints.txt -e '.[dev,tpu,cuda]'
	touch $@

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The stamp holds how many seconds it took, for the demo's report. PyTorch comes first and without
# CUDA, which would be several GB: from where pip looks anyhow, from PyTorch's own index, or else
# whatever PyPI has for this system.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 13) else "error: Python 3.11 or 3.12 is needed: make PYTHON=python3.11")'
	@echo "building .venv: a few minutes, once"
	$(PYTHON) -m venv .venv
	@date +%s > .venv/began
	{ test -n "$(TORCH_INDEX)" && { \
	  $(PIP) -c constraints.txt "$(TORCH)+cpu" 2> /dev/null \
	  || $(PIP) -c constraints.txt "$(TORCH)+cpu" --extra-index-url "$(TORCH_INDEX)"; }; } \
	|| $(PIP) -c constraints.txt "$(TORCH)"
	$(PIP) -c constraints.txt -e '.[dev]'
	@echo $$(( $$(date +%s) - $$(cat .venv/began) )) > $@

# Trains again, from nothing, everything that miniature/ ships.
miniature: .venv/installed
	$(BIN)/fact-train run mini_vae --out runs/mini_vae
	$(BIN)/fact-train run mini_base --out runs/mini_base options.vae=runs/mini_vae/export/vae
	$(BIN)/fact-train run mini_encoder --out runs/mini_encoder
	$(BIN)/fact-train run mini_judge --out runs/mini_judge "options.networks=('recogniser','parser')"
	$(BIN)/fact-train run mini_judge --out runs/mini_features "options.networks=('features',)" options.people=9000 options.photos=2 steps=1500
	$(BIN)/fact-convert to-torch runs/mini_base/export/base miniature/base --dtype float16 --force
	mkdir -p miniature/encoder miniature/judge miniature/adapter
	$(BIN)/fact-convert to-torch runs/mini_encoder/export/encoder miniature/encoder/model.safetensors --dtype float16 --force
	cp runs/mini_encoder/export/encoder/config.json miniature/encoder/
	cp runs/mini_judge/export/judge/*.safetensors runs/mini_features/export/judge/*.safetensors miniature/judge/
	$(BIN)/fact-train run mini --out runs/mini
	$(BIN)/fact-train run mini_points --out runs/mini_points
	$(BIN)/fact-convert to-torch runs/mini_points miniature/adapter/adapter.safetensors --dtype float16 --force
	for run in vae base encoder judge features points; do mkdir -p miniature/logs/$$run && cp runs/mini_$$run/log.txt runs/mini_$$run/metrics.jsonl runs/mini_$$run/config.json miniature/logs/$$run/; done
	mkdir -p miniature/logs/adapter && cp runs/mini/log.txt runs/mini/metrics.jsonl runs/mini/config.json miniature/logs/adapter/

clean:
	rm -rf demo .venv .venv-accelerators build *.egg-info
