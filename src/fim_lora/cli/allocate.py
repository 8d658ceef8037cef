"""`fim-lora allocate`: from a model and data to an adapter config with its ranks."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from peft import LoraConfig
from rich.console import Console

from ..config import FimConfig
from ..rank_allocation import RankAllocation
from ..ranks.allocation import ALLOCATION_FILE
from ..report.rank_map import draw_rank_map
from ..runtime.atomic import staged_files
from ..scoring import get_fim_scores
from .data import CalibrationData, load_data, require_data
from .models import (
    PEFT_TASK_TYPES,
    ModelSource,
    Task,
    default_target_modules,
    find_model,
    load_model,
    load_tokenizer,
    require_fitting_tokens,
)
from .output import OUTPUT_FILES, RANK_MAP, require_writable
from .summary import print_summary
from .tokenization import Examples, tokenize

_RECORDED_PACKAGES = ("fim-lora", "peft", "transformers", "torch", "datasets")


@dataclass(frozen=True)
class AllocateOptions:
    """The options of `fim-lora allocate`, checked as far as possible without reading the model or the data.

    Attributes:
        model: Hub id, folder or GGUF file.
        data: Data file, or dataset on the Hub.
        overwrite: Whether files of an earlier run in `output` may be replaced.
        r: Rank of uniform LoRA.
        target_modules: As for `LoraConfig`; `None` means PEFT's default for the architecture.
        max_length: Maximum number of tokens of an example.
        subset: Configuration of a dataset on the Hub that has several.
        column_names: Role to column name, for the columns that were assigned.
        dtype: `"auto"` or the name of a torch dtype.
        seed: Decides which examples are drawn, and the initial values of a new classification head.
        serving: Whether `r` and `lora_alpha` are written for servers; see `RankAllocation.to_lora_config`.
    """

    model: str
    data: str
    output: Path
    overwrite: bool
    r: int
    lora_alpha: int
    target_modules: list[str] | str | None
    fim_config: FimConfig
    batch_size: int
    max_length: int
    task: Task
    split: str
    subset: str | None
    column_names: Mapping[str, str]
    dtype: str
    device: torch.device
    seed: int
    serving: bool

    def lora_config(self, model_name: str) -> LoraConfig:
        """The adapter config before allocation.

        `model_name` is the model's `name_or_path`, which is the folder of a GGUF file; PEFT warns if the config names
        another model.
        """
        return LoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,
            target_modules=self.target_modules,
            task_type=PEFT_TASK_TYPES[self.task],
            init_lora_weights="fim",
            fim_config=self.fim_config,
            base_model_name_or_path=model_name,
        )


def allocate(options: AllocateOptions, console: Console) -> None:
    """Calibrate, allocate, write the output folder and print the summary on `console`."""
    show_progress_bars = sys.stderr.isatty()
    require_writable(options.output, options.overwrite)
    source = find_model(options.model)
    require_data(options.data)
    times = _Stopwatch()
    with _quiet_libraries(show_progress_bars):
        with times.measure("loading"):
            data = load_data(options.data, options.split, options.subset, options.task, options.column_names)
            tokenizer = load_tokenizer(source)
        with times.measure("tokenizing"):
            count = options.fim_config.fim_calibration_batches * options.batch_size
            examples = tokenize(data, tokenizer, count, options.max_length, options.seed, show_progress_bars)
        with times.measure("loading"):
            # A classification head starts at random values, on which the scores depend.
            torch.manual_seed(options.seed)
            labels, pad_token_id, device = data.label_names, tokenizer.pad_token_id, options.device
            model = load_model(source, options.task, options.dtype, device, labels, pad_token_id, show_progress_bars)
        require_fitting_tokens(model, examples.longest, examples.largest_id)
        config = options.lora_config(model.name_or_path)
        if config.target_modules is None:
            config.target_modules = default_target_modules(model)
        with times.measure("calibrating"):
            batches = examples.batches(tokenizer, options.batch_size)
            scores = get_fim_scores(model, batches, config, show_progress_bar=show_progress_bars)
    allocation = RankAllocation.from_scores(scores, config)
    new_config = allocation.to_lora_config(config, serving=options.serving)
    _write(options, allocation, new_config, _provenance(options, source, model, data))
    print_summary(console, allocation, _facts(options, model, data, examples, times))


def _write(
    options: AllocateOptions, allocation: RankAllocation, config: LoraConfig, provenance: Mapping[str, Any]
) -> None:
    with staged_files(options.output) as folder:
        config.save_pretrained(str(folder))
        allocation.save(folder / ALLOCATION_FILE, **provenance)
        draw_rank_map(allocation, folder / RANK_MAP)


def _provenance(options: AllocateOptions, source: ModelSource, model: Any, data: CalibrationData) -> dict[str, Any]:
    return {
        "versions": {name: version(name) for name in _RECORDED_PACKAGES} | {"python": platform.python_version()},
        "model": source.identity(model),
        "data": data.identity(),
        "task": options.task,
        "seed": options.seed,
        "max_length": options.max_length,
        "batch_size": options.batch_size,
        "dtype": _dtype_name(model),
        "device": str(options.device),
    }


def _facts(
    options: AllocateOptions, model: Any, data: CalibrationData, examples: Examples, times: _Stopwatch
) -> dict[str, str]:
    columns = ", ".join(f"{role} = {column!r}" for role, column in data.columns.items())
    contents = "text in blocks" if data.is_stream else f"{len(data.rows):,} rows, {columns}"
    truncated = f"{examples.num_truncated} of {len(examples.examples)} examples to {options.max_length} tokens"
    return {
        "Model": f"{options.model} ({type(model).__name__}, {_dtype_name(model)}, {options.device})",
        "Data": f"{data.name}, split {data.split}: {contents}",
        "Truncated": truncated,
        "Time": str(times),
        "Peak memory": ", ".join(_peak_memory(options.device)),
        "Written": f"{', '.join(OUTPUT_FILES)} in {options.output}",
    }


def _dtype_name(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


class _Stopwatch:
    """Seconds per stage; a stage may have several parts."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - start

    def __str__(self) -> str:
        return ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self._seconds.items())


def _peak_memory(device: torch.device) -> list[str]:
    peaks = []
    try:
        import resource
    except ImportError:  # not on Windows
        pass
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # macOS counts in bytes, other systems in kilobytes.
        peaks.append(f"{peak * (1 if sys.platform == 'darwin' else 1024) / 2**30:.2f} GiB in the process")
    if device.type == "cuda":
        peaks.append(f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on {device}")
    return peaks or ["unknown"]


@contextmanager
def _quiet_libraries(show_progress_bars: bool) -> Iterator[None]:
    """Hide log messages of libraries below errors, and their progress bars if stderr is not a terminal."""
    levels = transformers.utils.logging.get_verbosity(), datasets.utils.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    try:
        transformers.utils.logging.set_verbosity_error()
        datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
        if not show_progress_bars:
            transformers.utils.logging.disable_progress_bar()
            datasets.disable_progress_bars()
        yield
    finally:
        transformers.utils.logging.set_verbosity(levels[0])
        datasets.utils.logging.set_verbosity(levels[1])
        if bars[0] and not show_progress_bars:
            transformers.utils.logging.enable_progress_bar()
        if not bars[1] and not show_progress_bars:
            datasets.enable_progress_bars()
