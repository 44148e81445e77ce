# make demo: set up and run the main job      make test: set up and pass the tests
# make test-long: the further cases, which take minutes, and the golden runs
# make parity: compare with transformers and torch      make bench: print the benchmark tables
# make bench-step: a training step beside TRL, generation beside transformers
# make docs: build the site into site/
# make fuzz: look for inputs that break a door
# make faults: kill, stop and damage tiny runs in all ways, and print the table
# make compile-matrix: what fits on which TPU slice, by the TPU's compiler

# The first of these that is 3.11 or later. PYTHON=… names another.
PYTHON ?= $(shell for name in python3 python3.11 python3.12 python3.13 python3.14; do \
    "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$name" && break; \
    done)
VENV ?= .venv
RUN = $(VENV)/bin/python
# Tests have an environment of their own: theirs holds the TPU's compiler, by which JAX would look
# for a TPU at every start of the other.
TEST_VENV ?= .venv-test
RUN_TEST = $(TEST_VENV)/bin/python
FUZZ_SECONDS ?= 600
WORKDIR ?= runs/cpu_demo
SEED ?= 0

# A training step on CPU spends up to half of its time on page faults, unless arrays lie in huge pages
# and all freed memory stays with the process, in one heap: a threshold that is below what an update
# frees gives it back each time. Read by glibc, ignored elsewhere.
export GLIBC_TUNABLES = glibc.malloc.hugetlb=1
export MALLOC_ARENA_MAX = 1
export MALLOC_TOP_PAD_ = 67108864
export MALLOC_MMAP_THRESHOLD_ = 8589934592
export MALLOC_TRIM_THRESHOLD_ = 8589934592

# Compiled programs, kept between runs.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax

# Each module is compiled when it is first imported, and kept, instead of all that pip installs, most
# of which is never imported.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-long parity docs fuzz faults bench bench-step compile-matrix lint setup clean

setup: $(VENV)/installed

define environment
	@test -n "$(PYTHON)" || { echo "no Python of 3.11 or later was found (python3, python3.11 to" \
	    "python3.14): install one, or name one: make PYTHON=/path/to/python" >&2; exit 2; }
	@python=$(@D)/bin/python; test -x $$python || python="$(PYTHON)"; \
	    "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "$$python is no Python of 3.11 or later: name one, make PYTHON=/path/to/python, and" \
	    "remove $(@D) if an older one made it" >&2; exit 2; }
	@echo "installing the package and what it needs into $(@D): minutes, in which pip prints nothing"
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --no-compile --editable '.$(1)'
	touch $@
endef

$(VENV)/installed: setup.py
	$(call environment)

$(TEST_VENV)/installed-test: setup.py
	$(call environment,[test])

$(TEST_VENV)/installed-parity: $(TEST_VENV)/installed-test
	$(call environment,[parity])

$(VENV)/installed-peers: $(VENV)/installed
	$(call environment,[peers])

# On a CPU, also where the extra of a TPU or GPU is installed: its library would look for the device,
# print errors and take seconds. JAX_PLATFORMS=tpu make demo takes a TPU.
demo: export JAX_PLATFORMS ?= cpu
# Programs compile in less than half of the time and are as fast; ignored elsewhere than on CPU.
demo: export XLA_FLAGS ?= --xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=1
demo: setup
	$(RUN) -m emor3_jax.train --config=configs/cpu_demo.py --workdir=$(WORKDIR) --config.seed=$(SEED)

lint: $(TEST_VENV)/installed-test
	$(TEST_VENV)/bin/ruff check .
	$(TEST_VENV)/bin/ruff format --check .
	$(TEST_VENV)/bin/shellcheck tpu/*.sh .ci/run

# Two processes, which take the next file in the list's order, so that those that load the TPU's
# compiler come last in each. Without JAX_PLATFORMS, JAX would look for the TPU of that compiler,
# which tests install.
PYTEST = $(RUN_TEST) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15
test: export JAX_PLATFORMS = cpu
test: lint
	$(PYTEST) tests --ignore=tests/parity -m "not long"

# Further cases of what `make test` tries: other meshes, other moments of a signal, longer compiles;
# whole runs whose numbers are kept (tests/test_golden_runs.py), and checks shown to fail.
test-long: export JAX_PLATFORMS = cpu
test-long: $(TEST_VENV)/installed-test
	$(PYTEST) tests --ignore=tests/parity -m long

$(VENV)/installed-docs: $(VENV)/installed
	$(call environment,[docs])

# Without a network, once it is installed.
docs: export JAX_PLATFORMS = cpu
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

$(TEST_VENV)/installed-compile: $(TEST_VENV)/installed-test
	$(call environment,[compile])

# Hours on 2 cores; goes on where it was stopped. SLICES="v4-8 v5e-16" compiles only these.
compile-matrix: export JAX_PLATFORMS = cpu
compile-matrix: $(TEST_VENV)/installed-compile
	nice -n 10 $(RUN_TEST) -m benchmarks.compile_matrix $(SLICES)

$(TEST_VENV)/installed-fuzz: $(TEST_VENV)/installed-test
	$(call environment,[fuzz])

# Ten minutes, or FUZZ_SECONDS=…: looks for inputs by which a door fails (tests/fuzz).
fuzz: export JAX_PLATFORMS = cpu
fuzz: $(TEST_VENV)/installed-fuzz
	PYTHONPATH=tests:. $(RUN_TEST) -m fuzz.run --seconds=$(FUZZ_SECONDS)

# Tests of one file are shared out too. TEXTS=1000000 reads ten times as many, in seven minutes.
parity: export TEXTS ?= 100000
parity: $(TEST_VENV)/installed-parity
	$(PYTEST) --dist worksteal tests/parity

# Minutes on 2 cores. `make test` tries a few of its rows.
faults: $(TEST_VENV)/installed-test
	$(RUN_TEST) -m tests.faults

bench: setup
	$(RUN) -m benchmarks.grouped
	$(RUN) -m benchmarks.rewards
	$(RUN) -m benchmarks.input

# Beside TRL and transformers, whose torch is gigabytes on some platforms. The large case beside the
# best of TRL alone: all three of its variants at once want more than 24 GiB.
bench-step: $(VENV)/installed-peers
	$(RUN) -m benchmarks.step --cases 0
	$(RUN) -m benchmarks.step --cases 1 --peers bfloat16
	$(RUN) -m benchmarks.generation

clean:
	rm -rf $(VENV) $(TEST_VENV) runs site .cache
