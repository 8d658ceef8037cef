"""What `fim-lora compress` reads: the data, as batches with the classes of the adapter, and the adapted model."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fim_lora_command.choices import Task
from fim_lora_command.errors import CommandError

from ..spectrum import MAX_BATCHES
from .adapter_source import AdapterSource, task_of
from .classes import Head, class_names, with_classes, with_same_classes
from .data import CalibrationData, load_data
from .models import (
    ModelSource,
    find_model,
    load_tokenizer,
    prepared_model,
    read_config,
    read_model,
    require_fitting_tokens,
)
from .run_facts import timed, timed_loading
from .tokenization import Examples, tokenize
from .trained_adapter import load_adapter


@dataclass(frozen=True)
class CompressOptions:
    """The options of `fim-lora compress`, checked as far as possible without reading the adapter or the data.

    `data` is `None` for a compression without data. `size` has the one argument of `compress_lora` that gives the
    size. `batches` is `None` for as many as are needed, `eval_batches` for all.
    """

    adapter: str
    model: str | None
    data: str | None
    eval_data: str | None
    output: Path
    overwrite: bool
    size: Mapping[str, Any]
    r_max: int | None
    serving: bool
    batches: int | None
    eval_batches: int | None
    batch_size: int
    max_length: int
    task: Task | None
    split: str
    eval_split: str
    subset: str | None
    column_names: Mapping[str, str]
    dtype: str
    device: torch.device
    seed: int
    trust_remote_code: bool
    as_json: bool


@dataclass(frozen=True)
class Tokenized:
    """Data, its tokenized examples, and the batches of these, which can be read several times."""

    data: CalibrationData
    examples: Examples
    batches: Any


@dataclass(frozen=True)
class Inputs:
    """What is read before the model. `classes` names the outputs of a classifier, in their order."""

    base: ModelSource
    task: Task
    classes: Sequence[str]
    pad_token_id: int | None
    calibration: Tokenized | None
    evaluation: Tokenized | None


def read_inputs(options: CompressOptions, source: AdapterSource, seconds: dict[str, float]) -> Inputs:
    """Read the data and the tokenizer."""
    task = task_of(source, options.task)
    with timed_loading(seconds):
        base = _find_base(options, source)
        base.announce_code()
        data, evaluation = _load_data(options, task)
        classes: Sequence[str] = ()
        if task == "seq-cls":
            data, evaluation, classes = _with_classes(source, base, data, evaluation)
        tokenizer = None if data is evaluation is None else _load_tokenizer(options, source, base)

    def tokenized(part: CalibrationData | None, num_batches: int | None) -> Tokenized | None:
        if part is None or tokenizer is None:
            return None
        count = sys.maxsize if num_batches is None else num_batches * options.batch_size
        examples = tokenize(part, tokenizer, count, options.max_length, options.seed)
        return Tokenized(part, examples, examples.batches(tokenizer, options.batch_size))

    with timed(seconds, "tokenizing"):
        calibration = tokenized(data, options.batches or MAX_BATCHES)
        measured = tokenized(evaluation, options.eval_batches)
    pad_token_id = None if tokenizer is None else tokenizer.pad_token_id
    return Inputs(base, task, classes, pad_token_id, calibration, measured)


def load_adapted_model(
    options: CompressOptions, source: AdapterSource, inputs: Inputs, show_library_bars: bool
) -> Any:
    """Load the base model and the adapter on it."""
    with _hint_at_base(source, inputs.base):
        model, missing = read_model(inputs.base, inputs.task, options.dtype, inputs.classes, show_library_bars)
    model = prepared_model(model, inputs.pad_token_id, options.device)
    for part in (inputs.calibration, inputs.evaluation):
        if part is not None:
            require_fitting_tokens(model, part.examples.token_ids)
    return load_adapter(model, missing, source, inputs.task, options.device)


def _find_base(options: CompressOptions, source: AdapterSource) -> ModelSource:
    if options.model is not None:
        return find_model(options.model, options.trust_remote_code)
    name = source.config.base_model_name_or_path
    if not isinstance(name, str) or not name:
        raise CommandError(f"{source.name} does not name its base model: give it as --model.")
    with _hint_at_base(source, ModelSource(name, name)):
        base = find_model(name, options.trust_remote_code)
    is_on_hub = not Path(base.location).exists()
    return replace(base, revision=source.config.revision) if is_on_hub else base


@contextmanager
def _hint_at_base(source: AdapterSource, base: ModelSource) -> Iterator[None]:
    """Explain errors of a base model that only the adapter names."""
    try:
        yield
    except CommandError as error:
        if base.name != source.config.base_model_name_or_path:
            raise
        raise CommandError(f"The base model that {source.name} names (give another as --model): {error}") from error


def _load_data(options: CompressOptions, task: Task) -> tuple[CalibrationData | None, CalibrationData | None]:
    def load(name: str | None, split: str) -> CalibrationData | None:
        return None if name is None else load_data(name, split, options.subset, task, options.column_names)

    return load(options.data, options.split), load(options.eval_data, options.eval_split)


def _with_classes(
    source: AdapterSource, base: ModelSource, data: CalibrationData | None, evaluation: CalibrationData | None
) -> tuple[CalibrationData | None, CalibrationData | None, Sequence[str]]:
    """Both with the same order of labels, and the names of the classes."""
    head = _head(source, base)
    if data is not None:
        data = with_classes(data, head)
        evaluation = None if evaluation is None else with_same_classes(evaluation, data, head)
        return data, evaluation, data.label_names
    if evaluation is not None:
        evaluation = with_classes(evaluation, head)
        return data, evaluation, evaluation.label_names
    return data, evaluation, [str(number) for number in range(head.num_classes)]


def _head(source: AdapterSource, base: ModelSource) -> Head:
    """The head that is saved with the adapter. Its outputs may have other names than those of the base model."""
    with _hint_at_base(source, base):
        names = class_names(read_config(base))
    return Head("the adapter's head", source.num_classes or len(names), names, is_named=False)


def _load_tokenizer(options: CompressOptions, source: AdapterSource, base: ModelSource) -> PreTrainedTokenizerBase:
    """The one that is saved with the adapter, as trainers do, or that of the base model."""
    if source.has_tokenizer:
        saved = ModelSource(source.name, str(source.folder), trust_remote_code=options.trust_remote_code)
        saved.announce_code()
        return load_tokenizer(saved)
    with _hint_at_base(source, base):
        return load_tokenizer(base)
