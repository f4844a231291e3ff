# Two commands: `make demo` and `make test`. Everything needed goes into ./.venv, nothing outside the clone.
# It takes Python 3.11+ with pip, make and a C compiler. Each step leaves a stamp file, so repeated runs are quick.
#
#   make test PYTHON=python3.13 VENV=.venv-3.13     another Python, in an environment of its own
#   make test PYTEST_ARGS="-k moments -x"           any pytest option
#   CI=1 make test                                  a build without OpenMP is an error

PYTHON ?= python3
VENV ?= .venv
DEV_VENV ?= .venv-dev
ECOSYSTEM_VENV ?= .venv-ecosystem
DOCS_VENV ?= .venv-docs
VERSIONS ?= 3.11 3.12 3.13 3.14
PYTEST_ARGS ?=
# Without PyTorch its rows are left out, instead of reported one by one as skipped.
BENCH_ARGS ?= $(shell $(PY) -c 'import torch' 2>/dev/null || echo "-b '^(?!.*torch)'")
NUMBERS_ARGS ?=
COMPARE_ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# The targets install into one environment: two installs at a time would break it.
.NOTPARALLEL:

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
# What goes into the wheel. An edit of any of these builds a new one.
SOURCES := $(shell find src -type f -not -name '*.pyc') $(wildcard meson.build meson.options pyproject.toml README.md LICENSE)
# Builds for CI and builds that take OpenMP as it comes have stamps of their own.
WHEEL := $(VENV)/.wheel$(if $(CI),-openmp)
BUILD_ARGS := $(if $(CI),--config-settings=setup-args=-Dopenmp=enabled)
# The pinned tools of an extra, without building fastbn.
EXTRA = $(PY) -c 'import sys, tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]]))'
# asv keeps its machine file in HOME: give it one inside the clone.
ASV = HOME=$(CURDIR)/.asv ../$(PY) -m asv

.PHONY: help demo build test test-all test-clang parity torch test-versions lint types bench asv-check numbers compare install-dev clean ecosystem docs

help: ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

demo: $(WHEEL)-demo ## train on handwritten digits, print what batch norm does, save plots
	$(VENV)/bin/fastbn demo

build: $(WHEEL)-test ## build, and install with what the tests need

test: $(WHEEL)-test ## build, install and test (without the slow tests)
	$(VENV)/bin/pytest -m "not slow" $(PYTEST_ARGS)

test-all: $(WHEEL)-test ## all tests, the slow ones too
	$(VENV)/bin/pytest $(PYTEST_ARGS)

# Clang needs its OpenMP runtime beside it (libomp-dev on Debian).
test-clang: $(WHEEL)-test $(VENV)/.clang ## a build by Clang: its instructions, and the same bits as the other build's
	FASTBN_OTHER_BUILD=$(abspath $(VENV))/clang/installed \
	    $(VENV)/bin/pytest tests/test_levels.py -m "not slow" -k "other and not kernel_tests" $(PYTEST_ARGS)

# Two environments of their own: PyTorch, Keras, flax, JAX, ONNX and scikit-learn in one, TensorFlow, whose requirements
# conflict with these, in the other. A framework that cannot be installed or imported is an error here, not a skip.
PARITY_EXAMPLES ?= 500
PARITY_TF := $(wildcard tests/parity/test_tf*.py)
PARITY_OTHERS := $(filter-out $(PARITY_TF),$(wildcard tests/parity/test_*.py))

parity: .venv-parity/.parity $(if $(PARITY_TF),.venv-parity-tf/.parity) ## compare with the real frameworks, 500 random configurations per test
	FASTBN_PARITY_EXAMPLES=$(PARITY_EXAMPLES) FASTBN_PARITY_REQUIRE=torch,keras,jax,flax,onnx,onnxruntime,sklearn \
	    KERAS_BACKEND=torch \
	    .venv-parity/bin/pytest $(PARITY_OTHERS) tests/test_converters.py tests/test_converter_messages.py tests/test_pages.py $(PYTEST_ARGS)
	.venv-parity/bin/pytest tests/test_sklearn_interop.py -k "onnx or tensors or dispatch" $(PYTEST_ARGS)
ifneq ($(PARITY_TF),)
	FASTBN_PARITY_EXAMPLES=$(PARITY_EXAMPLES) FASTBN_PARITY_REQUIRE=tensorflow,tf_keras,tf_slim TF_USE_LEGACY_KERAS=1 \
	    .venv-parity-tf/bin/pytest $(PARITY_TF) $(PYTEST_ARGS)
endif

# In the environment of `parity`, which has PyTorch. torch.compile needs a C++ compiler; without one its tests fail.
TORCH_TESTS := $(wildcard tests/test_torch*.py) tests/test_sklearn_interop.py tests/test_examples.py

torch: .venv-parity/.parity ## PyTorch's layers: operators, gradients, torch.compile, processes; skorch
	.venv-parity/bin/python -c 'import torch, skorch'
	.venv-parity/bin/pytest $(TORCH_TESTS) -k "torch or skorch" $(PYTEST_ARGS)

# At one level, which takes a third of the time: what kernels compute is no matter of the Python, and `make test` tests all.
test-versions: ## build and test with every Python of $(VERSIONS) that is at hand
	@tested=(); missing=(); \
	for version in $(VERSIONS); do \
	    python=; \
	    for candidate in "python$$version" "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/"$$version".*/bin/python; do \
	        if "$$candidate" -c 'import sys, venv; sys.exit(sys.implementation.name != "cpython")' 2>/dev/null; then \
	            python=$$candidate; break; \
	        fi; \
	    done; \
	    if [ -z "$$python" ]; then missing+=("$$version"); echo "== Python $$version: not found, skipped"; continue; fi; \
	    echo "== Python $$version: $$python"; \
	    FASTBN_BUILT_LEVELS=base $(MAKE) --no-print-directory test PYTHON="$$python" VENV=".venv-$$version" \
	        BUILD_ARGS="$(BUILD_ARGS) --config-settings=setup-args=-Dlevels=base"; \
	    tested+=("$$version"); \
	done; \
	echo "== tested: $${tested[*]:-none}; not found: $${missing[*]:-none}"

# In an environment of its own: what `make test` has no need of. mpiexec comes from the system (openmpi-bin on Debian).
ecosystem: $(ECOSYSTEM_VENV)/.ready ## scikit-learn, pandas, polars, Dask (a cluster that loses a worker), MPI
	@command -v mpiexec >/dev/null || { echo "mpiexec is not installed: no test under MPI"; test -z "$(CI)"; }
	$(ECOSYSTEM_VENV)/bin/pytest tests/test_sklearn*.py tests/test_dask*.py tests/test_mpi*.py tests/test_synchronized.py \
	    tests/test_pages.py tests/test_examples.py $(PYTEST_ARGS)

lint: $(WHEEL)-test $(VENV)/.lint ## ruff, cython-lint, codespell, numpydoc
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cython-lint src  # it starts pycodestyle by name
	$(VENV)/bin/codespell
	$(VENV)/bin/pytest -q tests/test_docstrings.py  # with numpydoc, which other targets do not install

# On the installed package, from a folder without src/: there each compiled module has its stub beside it. Not that of
# fastbn.torch, which cannot be imported without PyTorch, nor those of levels that this processor has not: their modules
# cannot either.
types: $(WHEEL)-test $(VENV)/.types ## mypy --strict, and stubtest on the compiled modules
	cd $(VENV) && bin/python -m mypy --strict --config-file $(CURDIR)/pyproject.toml -p fastbn
	cd $(VENV) && beyond=$$(bin/python -c 'from fastbn.kernels import _cpu, dispatch as d; \
	    print("|".join(level for level in d.LEVELS if level not in _cpu.supported()) or "none")') && \
	    bin/python -m mypy.stubtest --ignore-disjoint-bases \
	    --allowlist $(CURDIR)/tests/stubtest.txt --ignore-unused-allowlist \
	    $$(cd lib/python3*/site-packages && find fastbn -name '*.pyi' -not -path '*/torch/*' | \
	    sed -e 's/\.pyi$$//' -e 's#/#.#g' | grep -vE "_($$beyond)$$")

bench: $(WHEEL)-bench asv-check ## every benchmark once, on the working tree (BENCH_ARGS="-b Train" for some)
	cd benchmarks && $(ASV) run --quick --python=same --show-stderr --dry-run $(BENCH_ARGS)

numbers: $(WHEEL)-bench ## the table of the README (NUMBERS_ARGS=--torch with PyTorch, where it is installed)
	$(PY) -m benchmarks.table $(NUMBERS_ARGS)

compare: $(WHEEL)-bench ## beside the bandwidth limit and every peer that is installed (COMPARE_ARGS="--ops train")
	$(PY) -m benchmarks.compare $(COMPARE_ARGS)

# The wheel that is tested, in an environment of its own, with all that the API reference describes.
docs: $(DOCS_VENV)/.docs ## the documentation, into docs/_build/html; a warning is an error
	rm -rf docs/_build/html
	$(DOCS_VENV)/bin/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

asv-check: $(WHEEL)-bench .asv/.asv-machine.json ## the benchmark suite is well formed
	cd benchmarks && $(ASV) check --python=same

install-dev: ## editable install in .venv-dev: rebuilds what changed on import
	test -x $(DEV_VENV)/bin/python || $(MAKE) --no-print-directory $(DEV_VENV)/bin/python VENV=$(DEV_VENV)
	$(DEV_VENV)/bin/python -m pip --disable-pip-version-check --quiet install \
	    "meson-python>=0.18" "meson>=1.5" ninja "Cython>=3.3" "numpy>=2.0"
	PATH="$(CURDIR)/$(DEV_VENV)/bin:$$PATH" python -m pip --disable-pip-version-check --quiet install --no-build-isolation $(BUILD_ARGS) -e ".[dev]"

clean: ## remove environments, builds and caches
	rm -rf .venv .venv-* build docs/_build docs/auto .asv .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A Python without ensurepip (Debian splits it off) makes a bare environment, which its own pip then fills.
$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"fastbn needs Python 3.11 or newer, $(PYTHON) is {sys.version.split()[0]}: try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV) 2>/dev/null || { \
	    $(PYTHON) -m venv --clear --without-pip $(VENV); \
	    $(PYTHON) -m pip --python $(PY) install --quiet pip; }

# The wheel is that of $(VENV); the frameworks, which are large, are installed once, whatever changes in the library.
.venv-parity/.parity .venv-parity-tf/.parity: %/.parity: $(WHEEL) %/.frameworks
	$*/bin/python -m pip --disable-pip-version-check --quiet install --force-reinstall --no-deps $(VENV)/wheels/fastbn-*.whl
	@touch $@

.venv-parity/.frameworks .venv-parity-tf/.frameworks: %/.frameworks: pyproject.toml | $(WHEEL)
	@$(MAKE) --no-print-directory $*/bin/python VENV=$*
	@echo "installing the frameworks of $*"
	$(if $(findstring -tf,$*),,$*/bin/python -m pip --disable-pip-version-check --quiet install torch==2.13.0)
	wheel=$$(echo $(VENV)/wheels/fastbn-*.whl); \
	    $*/bin/python -m pip --disable-pip-version-check --quiet install "$$wheel[$(patsubst .venv-%,%,$*)]"
$(DOCS_VENV)/.docs: $(WHEEL)
	test -x $(DOCS_VENV)/bin/python || $(MAKE) --no-print-directory $(DOCS_VENV)/bin/python VENV=$(DOCS_VENV)
	wheel=$$(echo $(VENV)/wheels/fastbn-*.whl); pip="$(DOCS_VENV)/bin/python -m pip --disable-pip-version-check --quiet"; \
	$$pip install torch==2.13.0; $$pip install "$$wheel[docs]"; $$pip install --force-reinstall --no-deps "$$wheel"
	@touch $@

# Built once in isolation, which brings Meson, Ninja, Cython and NumPy; the targets install this same wheel.
$(WHEEL): $(SOURCES) | $(PY)
	@rm -rf $(VENV)/wheels
	@echo "building fastbn with $$($(PY) --version)"
	$(PIP) wheel --no-deps $(BUILD_ARGS) --wheel-dir $(VENV)/wheels .
	$(PIP) install --force-reinstall --no-deps $(VENV)/wheels/fastbn-*.whl
	@rm -f $(VENV)/.wheel*; touch $@

$(WHEEL)-demo $(WHEEL)-test $(WHEEL)-bench: $(WHEEL)-%: $(WHEEL)
	wheel=$$(echo $(VENV)/wheels/fastbn-*.whl); $(PIP) install "$$wheel[$*]"
	@touch $@

# The same wheel as everywhere.
$(ECOSYSTEM_VENV)/.ready: $(WHEEL)
	@test -x $(ECOSYSTEM_VENV)/bin/python || $(MAKE) --no-print-directory $(ECOSYSTEM_VENV)/bin/python VENV=$(ECOSYSTEM_VENV)
	wheel=$$(echo $(VENV)/wheels/fastbn-*.whl); \
	    install="$(ECOSYSTEM_VENV)/bin/python -m pip --disable-pip-version-check --quiet install"; \
	    $$install "$$wheel[ecosystem]"; $$install --force-reinstall --no-deps "$$wheel"
	@touch $@

# Installed beside the build that is tested, not over it.
$(VENV)/.clang: $(SOURCES) | $(PY)
	@rm -rf $(VENV)/clang
	@echo "building fastbn with $$(clang --version | head -n 1)"
	CC=clang $(PIP) wheel --no-deps --config-settings=setup-args=-Dopenmp=enabled --wheel-dir $(VENV)/clang/wheels .
	$(PIP) install --no-deps --target $(VENV)/clang/installed $(VENV)/clang/wheels/fastbn-*.whl
	@touch $@

$(VENV)/.lint $(VENV)/.types: $(VENV)/.%: pyproject.toml | $(PY)
	$(EXTRA) $* > $(VENV)/$*.txt
	$(PIP) install -r $(VENV)/$*.txt
	@touch $@

.asv/.asv-machine.json: | $(WHEEL)-bench
	@mkdir -p .asv
	cd benchmarks && $(ASV) machine --yes >/dev/null
