# The commands of this project. Each one sets up what it needs: nothing has to be installed
# beforehand but Python 3.11 or newer, git and make, and no environment has to be active.
#
#   make demo                                  the first recipe, end to end
#   make demo DEMO_ARGS="attention.gqa.kv_heads=1 trainer.max_steps=20"
#   make test PYTEST_ARGS="tests/plan -x"      WORKERS=0 for one process, with all threads
#   make fuzz EXAMPLES=500 SEED=1
#   make real REAL_ARGS="--minutes 60"         or --only original 'gqa-*', --list, --page
#   make demo PYTHON=/opt/python3.12/bin/python3
#   make real-model MODEL_ARGS="'stages=[plan,measure]'"
#   make test-newest PYTEST_ARGS="tests/plan"  the same tests on the newest versions of everything
#
# Tests of report.html need Chromium and its driver (Debian: chromium, chromium-driver), and are
# skipped without; with REQUIRE_CHROMIUM=1 they fail.
#
# Packages come from pip's configured index. On Linux, PyPI's torch brings several GB of CUDA
# libraries; `make demo PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu` avoids them.

VENV := .venv
NEWEST := .venv-newest
OLDEST := .venv-oldest
BIN := $(VENV)/bin/python
PIP := $(BIN) -m pip --disable-pip-version-check --no-input
# The versions to install; empty: the newest that the ranges in pyproject.toml allow.
PINS := constraints.txt
# Quiet, and once more aloud if that failed.
INSTALL_ARGS := install $(if $(PINS),--constraint $(PINS),--upgrade --upgrade-strategy eager)
BUILD_ARGS := $(if $(PINS),--build-constraint $(PINS))
define pip_install
$(PIP) --quiet --quiet $(INSTALL_ARGS) $(1) || $(PIP) $(INSTALL_ARGS) $(1)
endef
# torch is pinned by hand: the newest release of the day is rarely the one to want.
TORCH := 2.13.0

PYTEST_ARGS ?=
KILL_ARGS ?= --kills 30
DEMO_ARGS ?=
REAL_ARGS ?=
MODEL_ARGS ?=
WORKERS ?= 2
EXAMPLES ?= 5000
SEED ?= 0

# Libraries keep caches under HOME; where that cannot be written, a folder stands in for it.
SOME_HOME := $(if $(shell test -w "$$HOME" && echo yes),,HOME="$(CURDIR)/$(VENV)/home" )

# What runs here is this checkout in its own environment, whatever the shell has set.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

.NOTPARALLEL:
.PHONY: help demo real-model real test fuzz test-kills test-newest test-oldest lint types conf \
	wheel constraints constraints-oldest clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile

demo: $(VENV)/.installed  ## convert the embedded model to grouped queries and heal it
	$(SOME_HOME)$(BIN) train.py +recipe=gqa_convert $(DEMO_ARGS)

real-model: $(VENV)/.installed-real  ## fetch SmolLM2-135M, and plan grouped queries for it
	$(SOME_HOME)$(BIN) train.py +recipe=gqa_convert model=smollm2 attention.gqa.kv_heads=1 \
		'stages=[plan]' $(MODEL_ARGS)

real: $(VENV)/.installed-real  ## measure every headline on a real model, as far as it is not done
	$(SOME_HOME)$(BIN) -m benchmarks.real $(REAL_ARGS)

# With several workers, one thread each: torch's own threads would fight over the cores.
THREADS = $(if $(filter-out 0,$(WORKERS)),OMP_NUM_THREADS=1 )
test: $(VENV)/.installed-dev  ## every test
	$(SOME_HOME)$(THREADS)$(BIN) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# Both ends of the ranges, each in an environment of its own. What is newest is asked every time.
test-newest:  ## every test on the newest versions that pyproject.toml allows
	@rm -f $(NEWEST)/.installed-dev
	@$(MAKE) test VENV=$(NEWEST) PINS=
test-oldest:  ## every test on the oldest ones (constraints-oldest.txt)
	@$(MAKE) test VENV=$(OLDEST) PINS=constraints-oldest.txt

test-kills: $(VENV)/.installed-dev  ## kill small runs at random moments, and check what they leave
	$(SOME_HOME)OMP_NUM_THREADS=1 $(BIN) -m tests.integration.kills $(KILL_ARGS)

fuzz: $(VENV)/.installed-dev  ## generated damaged and hostile input, each bounded in time and memory
	$(SOME_HOME)OMP_NUM_THREADS=1 $(BIN) -m tests.hostile --examples $(EXAMPLES) --seed $(SEED)

lint: $(VENV)/.installed-dev  ## style and format
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .

types: $(VENV)/.installed-dev  ## static types
	$(BIN) -m mypy

conf: $(VENV)/.installed  ## the comments in conf/, from the options in the code
	$(SOME_HOME)$(BIN) -m surgery.config

wheel: $(VENV)/.installed-dev  ## a wheel in dist/
	rm -rf build/lib  # setuptools would pack what was deleted since
	$(BIN) -m build --wheel --no-isolation

clean:  ## remove the environment and everything built
	rm -rf $(VENV) $(NEWEST) $(OLDEST) build dist *.egg-info

# --- the environment -----------------------------------------------------------------------

# One stamp per set of packages, so that `make demo` need not wait for the test tools.
$(VENV)/.installed: pyproject.toml $(PINS)
	$(make_venv)
	@$(call pip_install,$(BUILD_ARGS) --editable .)
	@touch $@

$(VENV)/.installed-real: pyproject.toml $(PINS)
	$(make_venv)
	@$(call pip_install,$(BUILD_ARGS) --editable '.[real]')
	@touch $(VENV)/.installed $@

$(VENV)/.installed-dev: pyproject.toml $(PINS)
	$(make_venv)
	@$(call pip_install,$(BUILD_ARGS) --editable '.[dev]')
	@touch $(VENV)/.installed $(VENV)/.installed-real $@

IS_GOOD := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
CANDIDATES := python3.11 python3.12 python3.13 python3.14 python3 python

# $(call with_python,COMMAND): run a shell COMMAND with $$python set to a usable interpreter.
define with_python
@for python in $(or $(PYTHON),$(CANDIDATES)); do \
	if "$$python" -c '$(IS_GOOD)' >/dev/null 2>&1; then $(1); exit $$?; fi; \
done; \
echo "error: no usable Python found (tried: $(or $(PYTHON),$(CANDIDATES)))." >&2; \
echo "  needed: Python 3.11 or newer with venv and ensurepip (Debian, Ubuntu: python3-venv)" >&2; \
echo "  or name one: make ... PYTHON=/path/to/python3" >&2; \
exit 1
endef

# An environment whose pip does not answer was left half-made, and is made again.
define make_venv
@echo "Installing $(if $(PINS),pinned,the newest) versions into $(VENV); this takes a few minutes the first time."
$(call with_python,$(BIN) -m pip --version >/dev/null 2>&1 || "$$python" -m venv --clear $(VENV))
@$(call pip_install,pip)
endef

# Pins everything to what a clean environment gets today, keeping this file's head comment.
constraints:
	$(call with_python,"$$python" -m venv --clear build/constraints)
	build/constraints/bin/python -m pip install --quiet --upgrade pip
	build/constraints/bin/python -m pip install --quiet --editable '.[dev]' torch==$(TORCH)
	grep '^#' constraints.txt > build/constraints.txt
	build/constraints/bin/python -m pip freeze --all --exclude-editable > build/freeze.txt
	sed -E '/^(nvidia|cuda|triton)/d; s/^(torch==[^+]+)\+.*/\1/' build/freeze.txt \
		>> build/constraints.txt
	mv build/constraints.txt constraints.txt
	rm -rf build/constraints build/freeze.txt

# Pins what the package names at the lowest versions of its ranges, and what those need.
constraints-oldest:
	$(call with_python,"$$python" -m venv --clear build/constraints)
	build/constraints/bin/python -m pip install --quiet --upgrade pip uv
	grep '^#' constraints-oldest.txt > build/constraints.txt
	build/constraints/bin/uv pip compile pyproject.toml --extra dev --resolution lowest-direct \
		--python-version 3.11 --no-header --no-annotate --quiet | \
		sed -E '/^(nvidia|cuda|triton)/d; s/^(torch==[^+]+)\+.*/\1/' >> build/constraints.txt
	mv build/constraints.txt constraints-oldest.txt
	rm -rf build/constraints
