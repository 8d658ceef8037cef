"""`fim-lora allocate`: from a model and data to an adapter config with its ranks."""

import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from fim_lora_command.choices import Task

from ..rank_allocation import RankAllocation
from ..ranks.allocation import ALLOCATION_FILE
from ..ranks.compressed import COMPRESSION_FILE
from ..report.rank_map import draw_rank_map
from ..report.title_names import title_names
from ..runtime.atomic import staged_files
from ..scoring import get_fim_scores
from .classes import with_classes_of_model
from .data import CalibrationData, load_data
from .libraries import quiet_libraries
from .models import (
    ModelSource,
    default_target_modules,
    find_model,
    load_model,
    load_tokenizer,
    require_fitting_tokens,
)
from .output import OUTPUT_FILES, RANK_MAP, require_writable
from .provenance import now
from .run_facts import data_fact, dtype_name, peak_memory, recorded_versions, timed, truncation_fact
from .summary import print_summary
from .tokenization import Examples, tokenize


@dataclass(frozen=True)
class AllocateOptions:
    """The options of `fim-lora allocate`, checked as far as possible without reading the model or the data.

    `column_names` maps roles to the columns that were assigned. `dtype` is `"auto"` or the name of a torch dtype.
    `seed` determines which examples are drawn, and the initial values of a new classification head.
    """

    model: str
    data: str
    output: Path
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


def allocate(options: AllocateOptions) -> None:
    """Calibrate, allocate, write the output folder and print the summary."""
    show_progress_bars = sys.stderr.isatty()
    require_writable(options.output, options.overwrite, foreign=COMPRESSION_FILE)
    source = find_model(options.model, options.trust_remote_code)
    config = copy.copy(options.lora_config)
    seconds: dict[str, float] = {}
    with quiet_libraries(show_progress_bars):
        with timed(seconds, "loading"):
            data = _load_data(options, source)
            tokenizer = load_tokenizer(source)
        with timed(seconds, "tokenizing"):
            count = config.fim_config.fim_calibration_batches * options.batch_size
            examples = tokenize(data, tokenizer, count, options.max_length, options.seed, show_progress_bars)
        with timed(seconds, "loading"):
            # A classification head starts at random values, on which the scores depend.
            torch.manual_seed(options.seed)
            labels, pad_token_id, device = data.label_names, tokenizer.pad_token_id, options.device
            model = load_model(source, options.task, options.dtype, device, labels, pad_token_id, show_progress_bars)
        require_fitting_tokens(model, examples.token_ids)
        # For a GGUF file this is its folder. PEFT warns if the config names another model.
        config.base_model_name_or_path = model.name_or_path
        if config.target_modules is None:
            config.target_modules = default_target_modules(model)
        with timed(seconds, "calibrating"):
            batches = examples.batches(tokenizer, options.batch_size)
            scores = get_fim_scores(model, batches, config, show_progress_bar=show_progress_bars)
    allocation = RankAllocation.from_scores(scores, config)
    new_config = allocation.to_lora_config(config, serving=options.serving)
    _write(options, allocation, new_config, _provenance(options, source, model, data))
    print_summary(allocation, _facts(options, model, data, examples, seconds))


def _load_data(options: AllocateOptions, source: ModelSource) -> CalibrationData:
    """The data, with its labels in the order of the model's head."""
    data = load_data(options.data, options.split, options.subset, options.task, options.column_names)
    source.announce_code()
    return with_classes_of_model(data, source) if options.task == "seq-cls" else data


def _write(
    options: AllocateOptions, allocation: RankAllocation, config: LoraConfig, provenance: Mapping[str, Any]
) -> None:
    with staged_files(options.output) as folder:
        config.save_pretrained(str(folder))
        allocation.save(folder / ALLOCATION_FILE, **provenance)
        draw_rank_map(allocation, folder / RANK_MAP, **title_names(provenance))


def _provenance(options: AllocateOptions, source: ModelSource, model: Any, data: CalibrationData) -> dict[str, Any]:
    return {
        "date": now(),
        "versions": recorded_versions(),
        "model": source.identity(model),
        "data": data.identity(),
        "task": options.task,
        "seed": options.seed,
        "max_length": options.max_length,
        "batch_size": options.batch_size,
        "dtype": dtype_name(model),
        "device": str(options.device),
    }


def _facts(
    options: AllocateOptions, model: Any, data: CalibrationData, examples: Examples, seconds: Mapping[str, float]
) -> dict[str, str]:
    return {
        "Model": f"{options.model} ({type(model).__name__}, {dtype_name(model)}, {options.device})",
        "Data": data_fact(data),
        "Truncated": truncation_fact(examples, options.max_length),
        "Time": ", ".join(f"{stage} {duration:.1f} s" for stage, duration in seconds.items()),
        "Peak memory": peak_memory(options.device),
        "Written": f"{', '.join(OUTPUT_FILES)} in {options.output}",
    }
