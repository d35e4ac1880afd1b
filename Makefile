# Each of demo, test, bench, env does all the set-up: .venv, the pinned requirements, the package, compiled.
# Nothing outside the checkout is set. Another Python: make PYTHON=python3.12 test
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
TORCH := $(shell sed -n 's/^torch==//p' requirements-dev.txt)
# A compiled part that fails to build is an error here; =0 goes on without it.
export DFKERNELS_REQUIRE_NATIVE ?= 1

.PHONY: demo test bench env clean
.DELETE_ON_ERROR:

demo: $(VENV)/compiled
	$(PY) -m dfkernels demo

# The whole suite, then parts of it on the other instruction sets and without the compiled part (tests/__main__.py).
test: $(VENV)/compiled
	$(PY) -m tests

bench: $(VENV)/compiled
	$(PY) -m bench

env: $(VENV)/compiled
	@$(PY) -m dfkernels env

# The CPU build of torch: from the configured index where it has one, else from PyTorch's own. PyPI's Linux
# build would bring gigabytes of CUDA.
$(VENV)/torch: requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "needs Python >= 3.10: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install torch==$(TORCH)+cpu 2> /dev/null \
	  || $(PIP) install --index-url https://download.pytorch.org/whl/cpu torch==$(TORCH)
	@touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml setup.py $(wildcard _build/*.py)
	$(PIP) install -r requirements-dev.txt -e '.[test,demo]'
	@touch $@

# The editable installation imports _C from dfkernels/: compiling there is all that a change to csrc/ needs.
$(VENV)/compiled: $(VENV)/installed $(shell find csrc -type f)
	$(PY) setup.py -q build_ext --inplace
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info dfkernels/_C.*.so dfkernels/_no_native.txt .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
