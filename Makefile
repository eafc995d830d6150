# `make demo` and `make test` each need only Python 3.11, make and a network (or wheels that pip
# knows of): they build their own environments here and write nowhere else.

PYTHON ?= python3
BIN := "$(CURDIR)/.venv/bin"
BARE_BIN := "$(CURDIR)/.venv-bare/bin"
PIP_INSTALL := -m pip install -qq --disable-pip-version-check --no-compile -c constraints.txt

# Temporary files, caches and pictures of fonts stay in the checkout too.
export TMPDIR := $(CURDIR)/build/tmp
export MPLCONFIGDIR := $(CURDIR)/build/matplotlib
PIP_CACHE_DIR ?= $(CURDIR)/.cache/pip
export PIP_CACHE_DIR
export MPLBACKEND := Agg
unexport PYTHONPATH PYTHONHOME

# One thread a test worker: the workers already fill the cores.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 NUMBA_NUM_THREADS=1
PYTEST_ENV := $(ONE_THREAD) SCIPY_ARRAY_API=1

.NOTPARALLEL:
.PHONY: help demo test lint types wheel clean

help:
	@echo 'make demo    distil a small network trained on digits'
	@echo 'make test    lint, types, the wheel without torch, and the whole test suite'
	@echo 'make lint    ruff'
	@echo 'make types   mypy'
	@echo 'make wheel   build the wheel and test it where torch is not installed'
	@echo 'make clean   remove everything that these made'

demo: .venv/demo-installed | build/tmp
	$(BIN)/cvxdistill demo

# The full suite comes last, so that its closing line is the last one printed.
test: lint types wheel
	$(PYTEST_ENV) $(BIN)/pytest -n 2

lint: .venv/test-installed | build/tmp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy sees the three rooms as they are installed. It passes happily on files it did not find, so
# the number that it read must be the number there are.
types: .venv/test-installed | build/tmp
	rm -rf build/typing && mkdir -p build/typing/cvxdistill
	ln -s ../../../solvers ../../../adapters build/typing/cvxdistill/
	cd build/typing/cvxdistill && ln -s ../../../cvxdistill/* .
	cd build/typing && $(BIN)/mypy --config-file ../../pyproject.toml \
	    --cache-dir ../../.mypy_cache > ../mypy.txt 2>&1 || { cat ../mypy.txt; exit 1; }
	@cat build/mypy.txt
	@files=$$(find cvxdistill solvers adapters -name '*.py' | wc -l | tr -d ' '); \
	grep -q " in $$files source files" build/mypy.txt || \
	    { echo "mypy did not read all $$files files of the three rooms"; exit 1; }

# The wheel, installed where torch is not, and tested from a directory that is not the repository.
wheel: .venv/test-installed .venv-bare/created | build/tmp
	rm -rf dist build/bare && mkdir -p build/bare
	$(BIN)/python -m build > build/build.txt 2>&1 || { cat build/build.txt; exit 1; }
	$(BARE_BIN)/python $(PIP_INSTALL) dist/*.whl pytest pytest-xdist hypothesis pandas
	$(BARE_BIN)/python $(PIP_INSTALL) --no-deps --force-reinstall dist/*.whl
	cd build/bare && $(BARE_BIN)/python -c "import importlib.util as u, cvxdistill as c; \
	    assert '.venv-bare' in c.__file__ and not u.find_spec('torch'), c.__file__"
	cd build/bare && $(PYTEST_ENV) $(BARE_BIN)/pytest -n 2 -c ../../pyproject.toml \
	    ../../tests/solvers ../../tests/cvxdistill

# torch first and alone, so that nothing else decides which build of it comes.
.venv/demo-installed: .venv/created setup.cfg pyproject.toml constraints.txt | build/tmp
	$(BIN)/python $(PIP_INSTALL) torch==2.13.0
	$(BIN)/python $(PIP_INSTALL) -e ".[torch,plot]"
	touch $@

.venv/test-installed: .venv/demo-installed
	$(BIN)/python $(PIP_INSTALL) -e ".[dev]"
	touch $@

.venv/created .venv-bare/created: | build/tmp
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('constraints.txt needs \
	Python 3.11 or newer, this is ' + sys.version + ': say make PYTHON=python3.11')"
	$(PYTHON) -m venv $(@D)
	touch $@

build/tmp:
	mkdir -p $@

clean:
	rm -rf build dist .venv .venv-bare *.egg-info .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The solvers beside the peers'; needs CVXDISTILL_DATA. Hours, and the three long ones go on where
# they stopped; the quick one, of three small problems, under five minutes.
.PHONY: bench bench-quick
bench: .venv/test-installed | build/tmp
	$(BIN)/python bench/suite.py
	$(BIN)/python bench/relu_solvers.py
	$(BIN)/python bench/cone_decomposition.py
	$(BIN)/python bench/rooflines.py
	$(BIN)/python bench/mnist_outputs.py
	$(BIN)/python bench/startup.py
	$(BIN)/python bench/streaming_memory.py

bench-quick: .venv/test-installed | build/tmp
	$(BIN)/python bench/suite.py --quick

# R-FISTA beside pyscnn's on the UCI tables that CVXDISTILL_DATA holds: under 15 quiet minutes.
.PHONY: bench-uci
bench-uci: .venv/test-installed | build/tmp
	$(BIN)/python bench/uci_rfista.py
