"""Train and measure one run of `quality.py`: model, data, training loop and the losses that are recorded."""

from __future__ import annotations

import copy
import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from quality_cuts import CUTS, SLOW_START, training_events
from quality_methods import METHODS as COMPARED_METHODS
from quality_methods import Method, Setting, adapter_parameters
from quality_needs import NEEDS
from quality_results import Run
from quality_tasks import (
    HUB,
    TASKS,
    Batch,
    Example,
    Splits,
    Task,
    batches,
    evaluate,
    exact_match,
    load_model,
    load_splits,
    load_tokenizer,
    training_order,
)
from quality_variants import VARIANTS

METHODS: dict[str, Method] = COMPARED_METHODS | VARIANTS | NEEDS | CUTS | {SLOW_START: COMPARED_METHODS["uniform"]}
"""All methods and variants by name."""

WARM_UP = 0.1
"""Share of the steps in which the learning rate rises. It then falls linearly to zero."""

CLASSIFIER_LEARNING_RATE = 1e-2
"""Learning rate of a new classifier, for all methods. With one learning rate for adapter and classifier, the untrained
classifier would decide which learning rate is the best for the adapter."""

CALIBRATION_BATCHES = 8

CURVE_INTERVAL = 20
"""Steps between two measurements of the loss on the first `CURVE_EXAMPLES` examples of the development split."""

CURVE_EXAMPLES = 128
ANSWER_BATCH_SIZE = 16

_REPORTED_PACKAGES = ("fim-lora", "peft", "transformers", "torch")


class Bench:
    """Trains and measures runs. Reads each model and data set once.

    Attributes:
        source: Folder with the data files, or `HUB`.
        models: Model for `True` (causal tasks) and `False` (classification): hub id, folder or GGUF file.
        device: Device to train on.
    """

    def __init__(self, source: str, models: dict[bool, str], device: torch.device) -> None:
        self.source, self.models, self.device = source, models, device
        self._splits: dict[str, tuple[Splits, Any]] = {}
        self._last_key: Run | None = None
        self._last_adapted: tuple[Any, float] = None, 0.0

    def splits(self, task: Task) -> tuple[Splits, Any]:
        """The data of a task, and the tokenizer."""
        if task.name not in self._splits:
            tokenizer = load_tokenizer(self.models[task.causal])
            self._splits[task.name] = load_splits(task, self.source, tokenizer), tokenizer
        return self._splits[task.name]

    def result(self, run: Run, num_answers: int = 0) -> dict[str, Any]:
        """Train and measure a run.

        Args:
            run: The run.
            num_answers: Number of test questions to answer for the exact match, if the task asks questions.

        Returns:
            The content of the result file.
        """
        task = TASKS[run.task]
        splits, tokenizer = self.splits(task)
        size, pad = task.batch_size, tokenizer.pad_token_id
        examples = self._training_examples(run)
        model, calibration_seconds = self._adapted_model(run)
        initial_parameters = adapter_parameters(model)

        curve, training_seconds = [], 0.0
        curve_examples = splits.development[:CURVE_EXAMPLES]
        data = batches(examples[: run.steps * size], size, pad, self.device)
        for step, seconds in self._train(model, task, run, data):
            training_seconds += seconds
            if step % CURVE_INTERVAL == 0 and step < run.steps:
                curve.append([step, self._measure(model, task, curve_examples, pad)["loss"]])
        development = self._measure(model, task, splits.development, pad)
        if run.steps % CURVE_INTERVAL == 0:
            # The examples of the curve are all of a small split, which does not need to be measured twice.
            whole = len(curve_examples) == len(splits.development)
            last = development if whole else self._measure(model, task, curve_examples, pad)
            curve.append([run.steps, last["loss"]])
        test = self._measure(model, task, splits.test, pad)
        if task.causal and num_answers:
            questions = splits.test[:num_answers]
            test["exact_match"] = exact_match(model, questions, tokenizer, ANSWER_BATCH_SIZE, self.device)
            test["exact_match_examples"] = len(questions)
        return {
            "run": asdict(run),
            "development": development,
            "test": test,
            "curve": curve,
            "adapter_parameters": adapter_parameters(model),
            "initial_adapter_parameters": initial_parameters,
            "calibration_seconds": calibration_seconds,
            "training_seconds": training_seconds,
        }

    def _training_examples(self, run: Run) -> list[Example]:
        """The training examples in their order. The calibration batches are the first of them."""
        task = TASKS[run.task]
        train = self.splits(task)[0].train
        lengths = [len(example.input_ids) for example in train]
        num_batches = max(run.steps, CALIBRATION_BATCHES)
        return [train[index] for index in training_order(lengths, task.batch_size, num_batches, run.seed)]

    def _adapted_model(self, run: Run) -> tuple[Any, float]:
        """A model with a fresh adapter, and the seconds that the method took to make it.

        Neither depends on the learning rate, so the last pair is kept.
        """
        key = replace(run, learning_rate=0.0)
        if key != self._last_key:
            self._last_adapted, self._last_key = self._make_adapted_model(run), key
        model, seconds = self._last_adapted
        return copy.deepcopy(model), seconds

    def _make_adapted_model(self, run: Run) -> tuple[Any, float]:
        task = TASKS[run.task]
        splits, tokenizer = self.splits(task)
        size, pad = task.batch_size, tokenizer.pad_token_id
        dtype = getattr(torch, run.dtype)
        model = load_model(task, self.models[task.causal], splits.num_labels, run.seed, self.device, dtype)
        model.config.pad_token_id = pad
        calibration_examples = self._training_examples(run)[: CALIBRATION_BATCHES * size]
        calibration = list(batches(calibration_examples, size, pad, self.device))
        task_type = "CAUSAL_LM" if task.causal else "SEQ_CLS"
        start = self._synchronized_time()
        setting = Setting(model, task.targets[run.targets], run.rank, task_type, calibration, run.steps, run.seed)
        adapted = METHODS[run.method](setting)
        return adapted, self._synchronized_time() - start

    def _synchronized_time(self) -> float:
        """The time in seconds, after a GPU has finished its queued work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _train(self, model: Any, task: Task, run: Run, data: Iterator[Batch]) -> Iterator[tuple[int, float]]:
        """Train on the batches, and yield the number and the seconds of each step."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer, schedule = optimizer_and_schedule(model, run.learning_rate, run.steps)
        update_ranks = getattr(getattr(model, "base_model", None), "update_and_allocate", None)
        events = training_events(run, model, optimizer)
        torch.manual_seed(2000 + run.seed)
        for step, batch in enumerate(data):
            start = self._synchronized_time()
            model.train()
            events.begin_step(step, batch)
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            events.before_optimizer()
            optimizer.step()
            events.end_step(step)
            schedule.step()
            if update_ranks is not None:
                update_ranks(step)
            optimizer.zero_grad()
            yield step + 1, self._synchronized_time() - start

    def _measure(self, model: Any, task: Task, examples: Sequence[Example], pad: int) -> dict[str, float]:
        # Batches of examples of similar length avoid most of the padding and do not change the result.
        by_length = sorted(examples, key=lambda example: len(example.input_ids))
        return evaluate(model, task, batches(by_length, 4 * task.batch_size, pad, self.device))


def optimizer_and_schedule(model: Any, learning_rate: float, steps: int) -> tuple[torch.optim.AdamW, LambdaLR]:
    """AdamW with a learning rate of its own for a classifier, and its warm-up and linear decay.

    Args:
        model: The model with its adapter.
        learning_rate: Peak learning rate of the adapter.
        steps: Training steps.

    Returns:
        The optimizer and the schedule, to be stepped together.
    """
    optimizer = torch.optim.AdamW(_parameter_groups(model, learning_rate), weight_decay=0.0)
    warm_up = max(1, round(WARM_UP * steps))
    return optimizer, LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
    )


def _parameter_groups(model: Any, learning_rate: float) -> list[dict[str, Any]]:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapter = [parameter for name, parameter in trained.items() if "lora_" in name]
    classifier = [parameter for name, parameter in trained.items() if "lora_" not in name]
    groups = [{"params": adapter, "lr": learning_rate}, {"params": classifier, "lr": CLASSIFIER_LEARNING_RATE}]
    return [group for group in groups if group["params"]]


def environment(source: str, models: Mapping[bool, str]) -> dict[str, Any]:
    """Everything besides the run that a result depends on.

    Args:
        source: Folder with the data files, or `HUB`.
        models: Model for causal tasks (`True`) and for classification (`False`). Only the name of a path is recorded.

    Returns:
        Git revision, package versions, processor and its widest vector instructions, GPU, models and data.
    """
    command = ["git", "describe", "--always", "--dirty"]
    described = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {name: importlib.metadata.version(name) for name in _REPORTED_PACKAGES}
    return {
        "revision": described.stdout.strip(),
        "versions": versions,
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": gpu,
        "encoder": Path(models[False]).name,
        "decoder": Path(models[True]).name,
        "data": source if source == HUB else "files",
    }
