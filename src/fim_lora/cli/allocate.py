"""`fim-lora allocate`: from a model and data to an adapter config with its ranks."""

import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase

from fim_lora_command.choices import Task

from ..rank_allocation import RankAllocation
from ..ranks.compressed import COMPRESSION_FILE
from ..scoring import get_fim_scores
from .classes import with_classes_of_model
from .data import CalibrationData, load_data
from .dry_run import dry_run
from .json_output import print_json, result_document
from .libraries import quiet_libraries
from .models import (
    ModelSource,
    default_target_modules,
    find_model,
    load_model,
    load_tokenizer,
    require_fitting_tokens,
)
from .output import OUTPUT_FILES, require_writable, write_allocation
from .provenance import now
from .run_facts import data_fact, dtype_name, peak_memory, recorded_versions, timed, timed_loading, truncation_fact
from .summary import print_next_step, print_summary
from .tokenization import Examples, tokenize


@dataclass(frozen=True)
class AllocateOptions:
    """The options of `fim-lora allocate`, checked as far as possible without reading the model or the data.

    With `dry_run`, only the first batch is run, and `output` may be `None`. `column_names` maps roles to the columns
    that were assigned. `dtype` is `"auto"` or the name of a torch dtype. `seed` determines which examples are drawn,
    and the initial values of a new classification head.
    """

    model: str
    data: str
    output: Path | None
    overwrite: bool
    lora_config: LoraConfig
    batch_size: int
    max_length: int
    task: Task
    split: str
    subset: str | None
    column_names: Mapping[str, str]
    dtype: str
    device: torch.device
    seed: int
    trust_remote_code: bool
    serving: bool
    as_json: bool
    dry_run: bool


@dataclass(frozen=True)
class _Inputs:
    """What the calibration needs; `config` has the targets and the name of the model."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    data: CalibrationData
    examples: Examples
    config: LoraConfig


def allocate(options: AllocateOptions) -> None:
    """Calibrate, allocate, write the output folder and print the summary; or tell what this would take."""
    show_library_bars = sys.stderr.isatty()
    if options.output is not None:
        require_writable(options.output, options.overwrite, OUTPUT_FILES, foreign=COMPRESSION_FILE)
    source = find_model(options.model, options.trust_remote_code)
    seconds: dict[str, float] = {}
    with quiet_libraries(show_library_bars):
        inputs = _read_inputs(options, source, seconds, show_library_bars)
        batches = inputs.examples.batches(inputs.tokenizer, options.batch_size)
        if options.dry_run:
            dry_run(inputs.model, batches, inputs.config, _facts(options, inputs), seconds, options.as_json)
            return
        with timed(seconds, "calibrating"):
            scores = get_fim_scores(inputs.model, batches, inputs.config)
    output = cast(Path, options.output)
    allocation = RankAllocation.from_scores(scores, inputs.config)
    new_config = allocation.to_lora_config(inputs.config, serving=options.serving)
    provenance = _provenance(options, source, inputs)
    write_allocation(output, allocation, new_config, provenance)
    if options.as_json:
        print_json(result_document(allocation, output, provenance, seconds=seconds))
        return
    facts = _facts(options, inputs) | {
        "Time": ", ".join(f"{stage} {duration:.1f} s" for stage, duration in seconds.items()),
        "Peak memory": peak_memory(options.device),
        "Written": f"{', '.join(OUTPUT_FILES)} in {output}",
    }
    print_summary(allocation, facts)
    print_next_step(allocation, output)


def _read_inputs(
    options: AllocateOptions, source: ModelSource, seconds: dict[str, float], show_library_bars: bool
) -> _Inputs:
    config = copy.copy(options.lora_config)
    with timed_loading(seconds):
        data = _load_data(options, source)
        tokenizer = load_tokenizer(source)
    with timed(seconds, "tokenizing"):
        count = config.fim_config.fim_calibration_batches * options.batch_size
        examples = tokenize(data, tokenizer, count, options.max_length, options.seed)
    with timed_loading(seconds):
        # A classification head starts at random values, on which the scores depend.
        torch.manual_seed(options.seed)
        labels, pad_token_id, device = data.label_names, tokenizer.pad_token_id, options.device
        model = load_model(source, options.task, options.dtype, device, labels, pad_token_id, show_library_bars)
    require_fitting_tokens(model, examples.token_ids)
    # For a GGUF file this is its folder. PEFT warns if the config names another model.
    config.base_model_name_or_path = model.name_or_path
    if config.target_modules is None:
        config.target_modules = default_target_modules(model)
    return _Inputs(model, tokenizer, data, examples, config)


def _load_data(options: AllocateOptions, source: ModelSource) -> CalibrationData:
    """The data, with its labels in the order of the model's head."""
    data = load_data(options.data, options.split, options.subset, options.task, options.column_names)
    source.announce_code()
    return with_classes_of_model(data, source) if options.task == "seq-cls" else data


def _provenance(options: AllocateOptions, source: ModelSource, inputs: _Inputs) -> dict[str, Any]:
    targets = inputs.config.target_modules
    return {
        "date": now(),
        "versions": recorded_versions(),
        "model": source.identity(inputs.model),
        "data": inputs.data.identity(),
        "task": options.task,
        "seed": options.seed,
        "max_length": options.max_length,
        "batch_size": options.batch_size,
        "dtype": dtype_name(inputs.model),
        "device": str(options.device),
        # The targets in the config are others if layers lost their adapter.
        "target_modules": targets if isinstance(targets, str) else sorted(targets or ()),
    }


def _facts(options: AllocateOptions, inputs: _Inputs) -> dict[str, str]:
    model = inputs.model
    return {
        "Model": f"{options.model} ({type(model).__name__}, {dtype_name(model)}, {options.device})",
        "Data": data_fact(inputs.data),
        "Truncated": truncation_fact(inputs.examples, options.max_length),
    }
