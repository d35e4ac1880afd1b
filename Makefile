# Each of demo, check, test, bench, env does all the set-up: .venv, the pinned requirements, the package, compiled.
# Nothing outside the checkout is set. Another Python: make PYTHON=python3.12 test
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
TORCH := $(shell sed -n 's/^torch==//p' requirements-dev.txt)
# A compiled part that fails to build is an error here; =0 goes on without it.
export DFKERNELS_REQUIRE_NATIVE ?= 1

.PHONY: demo check test bench env clean
.DELETE_ON_ERROR:

demo: $(VENV)/compiled
	$(PY) -m experiments demo

# Layout of the code, lint, types: seconds.
check: $(VENV)/installed
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pyrefly check --python-interpreter-path $(PY)

# The whole suite, then parts of it on the other instruction sets and without the compiled part (tests/__main__.py).
test: $(VENV)/compiled
	$(PY) -m tests

bench: $(VENV)/compiled
	$(PY) -m bench
	$(PY) -m bench.derivatives

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

# The documentation as a static site, in build/docs. A warning is an error.
.PHONY: docs
docs: $(VENV)/docs $(VENV)/compiled
	$(PY) -m sphinx -b html -W --keep-going -q -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

$(VENV)/docs: docs/requirements.txt $(VENV)/installed
	$(PIP) install -r docs/requirements.txt
	@touch $@

# Samplers of other libraries over our models and ours over theirs (tests/ecosystem/), in an environment of its own
# over .venv; writes the table in docs/guide/adapters.md. Without their dependencies, which would bring another torch.
.PHONY: ecosystem
ECO := build/ecosystem
ecosystem: $(ECO)/installed $(VENV)/compiled
	$(ECO)/bin/python tests/ecosystem

$(ECO)/installed: tests/ecosystem/requirements.txt $(VENV)/installed
	$(PY) -m venv $(ECO)
	$(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > $$($(ECO)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/over.pth
	$(ECO)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps -r $<
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info dfkernels/_C.*.so dfkernels/_no_native.txt .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Breaks the code one place at a time, in a copy; fails if the tests do not notice. Minutes.
.PHONY: mutants
mutants: $(VENV)/compiled
	$(PY) tests/mutants.py

# The compiled part under AddressSanitizer and UndefinedBehaviorSanitizer, in build/sanitize: nothing of the normal
# build changes. Needs gcc with libasan. Python's own memory is never given back: leaks are not looked at.
.PHONY: sanitize
SANITIZE := -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined
sanitize: $(VENV)/installed
	mkdir -p build/sanitize
	cp -r dfkernels build/sanitize/
	CXXFLAGS="-O1 -g1 -fno-omit-frame-pointer $(SANITIZE)" LDFLAGS="$(SANITIZE)" $(PY) -c "import sys; \
	  from pathlib import Path; sys.path.insert(0, '_build'); import native; \
	  native.build(Path('build/sanitize/dfkernels'), Path('build/sanitize/native'))"
	for isa in v3 base; do \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 DFKERNELS_ISA=$$isa OMP_NUM_THREADS=2 \
	  PYTHONPATH=$(CURDIR)/build/sanitize $(PY) -m pytest -q -p no:cacheprovider tests/test_raw_ops.py \
	    tests/test_outliers.py tests/test_processes.py tests/test_lists.py tests/test_kernels.py \
	    tests/test_pair_kernels.py tests/test_pair_atoms.py \
	    -k "not other_instruction and not past_the_end" || exit 1; \
	done
