# All set-up happens here: on a machine with nothing but Python 3.11 or newer, `make demo` and `make test` just work.
# pip is configured by its own environment variables and files; PIP_ARGS adds to them, for example the CPU build of
# torch: make demo PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'

PYTHON ?= $(shell for candidate in python3 python3.13 python3.12 python3.11; do \
	$$candidate -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo $$candidate; break; }; done)
PIP_ARGS ?=
WORKERS ?= 2
TESTS ?=
BENCH_ARGS ?=
FUZZ_SECONDS ?= 600
TARGETS ?=

BIN := .venv/bin
READY := .venv/.ready
BUILT := fixtures/built/.ready

# Models are small: more threads only make the workers wait for each other.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup demo test check check-format check-lint check-types check-layers check-docs
.PHONY: bench bench-page docs fixtures format fuzz gpu clean

help: ## what there is to make
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(READY) $(BUILT) ## scan, apply and verify on small models, before and after
	$(BIN)/python tools/demo.py

test: $(READY) ## the tests; TESTS=tests/test_find.py for some of them
	$(BIN)/python -m pytest -n $(WORKERS) $(TESTS)

check: check-format check-lint check-types check-layers check-docs test ## everything that must hold before a change is done

check-format: $(READY)
	$(BIN)/ruff format --check --quiet . || { $(BIN)/ruff format --diff . ; exit 1; }

check-lint: $(READY)
	$(BIN)/ruff check .

check-types: $(READY)
	$(BIN)/mypy

check-layers: $(READY)
	$(BIN)/lint-imports --no-cache --no-logo

check-docs: $(READY) $(BUILT)
	$(BIN)/python tools/make_docs.py --check
	$(BIN)/python tools/refresh_readme.py --check

docs: $(READY) $(BUILT) ## write the generated pages and the output shown in README.md again
	$(BIN)/python tools/make_docs.py
	$(BIN)/python tools/refresh_readme.py

bench: $(READY) ## time and memory beside peers, docs/benchmarks.md; BENCH_ARGS='--only cold-start' for a part
	PIP_ARGS="$(PIP_ARGS)" $(BIN)/python benchmarks/run.py $(BENCH_ARGS)

bench-page: $(READY) ## docs/benchmarks.md again from the figures that are there
	$(BIN)/python benchmarks/run.py --only

gpu: $(READY) ## on a CUDA device: the tests marked cuda, then figures and docs/gpu.md; one line where there is none
	$(BIN)/python benchmarks/gpu.py --check
	$(BIN)/python -m pytest -m cuda tests
	$(BIN)/python benchmarks/gpu.py

fuzz: $(READY) ## ten minutes of fuzzing for each reader; FUZZ_SECONDS=60 TARGETS=onnx for less; Linux, Python 3.11 to 3.13
	$(BIN)/python -c 'import atheris' 2>/dev/null \
		|| $(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[dev,fuzz]'
	nice -n 19 $(BIN)/python -m fuzz.run --seconds $(FUZZ_SECONDS) $(TARGETS)

fixtures: $(BUILT) ## the small models under fixtures/built

format: $(READY) ## format and sort imports
	$(BIN)/ruff check --fix --quiet --select I . ; $(BIN)/ruff format .

clean: ## remove everything that was built
	rm -rf .venv fixtures/built fixtures/demo benchmarks/built fuzz/corpus build dist *.egg-info
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

setup: $(READY) ## the environment in .venv

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'expected Python 3.11 or newer with venv and ensurepip, found none;' \
		'install one, or name it: make PYTHON=/path/to/python3' >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	touch $@

$(BUILT): $(READY) $(wildcard fixtures/*.py fixtures/architectures/*.py)
	$(BIN)/python fixtures/build.py
	touch $@
