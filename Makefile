# bdfast: every command of the README, in an environment that the first of them makes.
#
#   make demo    the main job from start to finish        make test     the tests (ARGS="-k sce" selects)
#   make env     the environment alone                    make lint     style and types
#   make doctor  which backend runs each op, and why      make bench    benchmarks of the ops
#   make wheel   sdist and wheel in dist/                 make clean    remove what was built
#
# Where $(PYTHON) already has PyTorch, that interpreter is used as it is, without a network if nothing is missing.
# Elsewhere a virtual environment .venv is made. Switches of the build, such as BDFAST_CUDA=1, are listed in setup.py.

PYTHON ?= python3
ARGS ?=

VENV := .venv/bin/python
# Pinned: an unpinned torch would take whatever is newest, and kernels are tested in Triton's interpreter with this one.
TORCH := torch==2.13.0
TRITON := triton==3.6.0; platform_system == "Linux"

PY := $(shell $(PYTHON) -c 'import importlib.util, sys; \
  print(sys.executable if importlib.util.find_spec("torch") else "$(VENV)")')
ifeq ($(PY),)
  $(error make: `PYTHON` expected Python 3.10 or newer, got $(PYTHON), which does not run; set PYTHON=/path/to/python3)
endif

# What the editable install needs to be there already to do without a network.
BUILD_TOOLS := setuptools, pybind11
TEST_TOOLS := pytest, hypothesis, sklearn, PIL, tqdm, yaml, safetensors, matplotlib

# Of torch's thousands of files a process imports some hundred, and to compile them all takes longer than the download.
# What the demo imports is compiled here, the rest when it is first imported.
INSTALL = $(PY) -m pip install -q --no-compile
IMPORTED := bdfast, sklearn.datasets, matplotlib.pyplot

SOURCES := setup.py pyproject.toml tools/toolchain.py $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')
SWITCHES := $(PY) $(BDFAST_CUDA) $(BDFAST_CUDA_ARCHS) $(CUDA_HOME) $(CXXFLAGS)

.PHONY: env demo test lint bench doctor sdist wheel python clean FORCE

env: build/env.stamp

demo: env
	$(PY) -m bdfast demo $(ARGS)

test: env
	$(PY) -m pytest $(ARGS)

doctor: env
	$(PY) -m bdfast doctor $(ARGS)

bench: env
	$(PY) -m pytest benchmarks --benchmark-only $(ARGS)

lint: build/lint.stamp
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	PATH="$(dir $(PY)):$$PATH" clang-format --dry-run -Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.h' 'csrc/*.cuh')

sdist: env
	rm -f dist/bdfast-*.tar.gz
	$(PY) -m build --no-isolation --sdist

# Made from the sdist, which is so known to be complete, and past pip's cache, which knows an sdist by its name alone.
# Wheels carry the CUDA kernels whether or not this machine has a GPU; WHEEL_SWITCHES=BDFAST_CUDA=0 leaves them out.
WHEEL_SWITCHES ?= BDFAST_CUDA=1
wheel: sdist
	$(WHEEL_SWITCHES) $(PY) -m pip wheel --no-cache-dir --no-build-isolation --no-deps -w dist dist/bdfast-*.tar.gz

# Prints the interpreter in use.
python:
	@echo $(abspath $(PY))

clean:
	rm -rf build dist bdfast.egg-info bdfast/_C*.so

# --- the environment --------------------------------------------------------------------------------------------------

build/env.stamp: $(SOURCES) build/switches
ifeq ($(PY),$(VENV))
	test -x $(VENV) || $(PYTHON) -m venv .venv
	$(PY) -c 'import torch' 2>/dev/null || $(INSTALL) '$(TORCH)'
	$(PY) -c 'import triton' 2>/dev/null || $(INSTALL) '$(TRITON)'
	$(PY) -c 'import $(BUILD_TOOLS)' 2>/dev/null || $(INSTALL) setuptools pybind11 ninja
	$(INSTALL) --no-build-isolation -e '.[test]'
	PYTHONDONTWRITEBYTECODE= $(PY) -c 'import $(IMPORTED)'
else
	@# torch is named with the version it has, so that nothing below can replace it.
	if $(PY) -c 'import $(BUILD_TOOLS), $(TEST_TOOLS)' 2>/dev/null; \
	then $(PY) -m pip install -q --no-build-isolation --no-deps -e .; \
	else $(PY) -m pip install -q -e '.[test]' "torch==$$($(PY) -c 'import torch; print(torch.__version__)')"; fi
endif
	@cat build/summary.txt
	@touch $@

build/lint.stamp: build/env.stamp
	$(PY) -c 'import ruff, mypy, clang_format' 2>/dev/null || $(PY) -m pip install -q --no-build-isolation -e '.[dev]'
	@touch $@

# Rewritten only when a switch changes, so that a changed one rebuilds and an unchanged one does not.
build/switches: FORCE
	@mkdir -p build
	@echo '$(SWITCHES)' | cmp -s - $@ || echo '$(SWITCHES)' > $@
