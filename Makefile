# make demo       train a small GPT with and without fewbit (about 8 minutes)
# make test       the tests
# make test-all   the slow ones too: more cases of what the others test, and whole examples
# make fuzz       2,000 random models (FUZZ=200 make fuzz: fewer)
# make lint       ruff and mypy
# make docs       the site of docs/ and of the docstrings, in build/site
# make results    the README's tables, made anew from bench/results (measures nothing)
# Another torch: TORCH=2.15.0 make test (in a virtual environment of its own)

TORCH ?=
PINNED := 2.13.0
PYTHON ?= python3
VENV := .venv$(if $(TORCH),-torch$(TORCH))
BIN := $(VENV)/bin
FLAGS ?=
FUZZ ?= 2000

.PHONY: demo test test-all fuzz lint docs results build/installed
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/python -m bench.demo $(FLAGS)

# Two processes, for a test mostly waits for one C++ compiler. OpenMP's threads of both would wait for each other busily.
test: CHOSEN := -m "not slow"
test test-all: $(VENV)/installed
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest tests --numprocesses 2 --dist worksteal $(CHOSEN) $(FLAGS)

# Each time with other models; a failure shrinks, and prints how to run it again.
fuzz: $(VENV)/installed
	FUZZ=$(FUZZ) $(BIN)/python -m pytest tests/test_fuzz.py --hypothesis-show-statistics $(FLAGS)

results: $(VENV)/installed
	$(BIN)/python -m bench.readme_tables

lint: $(VENV)/installed build/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd build/installed && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml -p fewbit_fx

docs: $(VENV)/installed build/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

# The packages as they are installed, where passes/ is fewbit_fx.passes: types are checked on them, docstrings read.
build/installed: $(VENV)/installed
	rm -rf build/installed build/lib
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target build/installed .

# torch comes first and alone, so that nothing else chooses its version.
$(VENV)/environment: requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==$(or $(TORCH),$(PINNED))
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@

$(VENV)/installed: $(VENV)/environment pyproject.toml
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
