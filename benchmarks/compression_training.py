"""Train the adapters that `compression.py` shrinks, by PEFT itself, and save each of them in a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from quality_tasks import (
    TASKS,
    Batch,
    Example,
    Splits,
    Task,
    batches,
    evaluate,
    load_model,
    load_splits,
    load_tokenizer,
    training_order,
)
from quality_training import optimizer_and_schedule

SCALING = 2
"""`lora_alpha / r` of every adapter."""

CUSTOMARY_LEARNING_RATE = 2e-4

_POSITIONS = 128


@dataclass(frozen=True)
class Run:
    """One trained adapter.

    Attributes:
        task: Name of the task.
        r: Rank of every layer.
        learning_rate: Peak learning rate of the adapter.
        seed: Seed of the adapter's initial values and of the order of the examples.
    """

    task: str
    r: int
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Name of the folder of the run."""
        return f"{self.task}-r{self.r}-lr{self.learning_rate:g}-seed{self.seed}"


# Learning rates are the grid of which the best one, by the loss on the development split, is the tuned one.
BENCHMARK_TASKS = {
    "banking77": replace(TASKS["banking77"], learning_rates=(1e-3, 2e-3, 4e-3), steps=300, max_length=48),
    "gsm8k": replace(TASKS["gsm8k"], learning_rates=(1e-3, 3e-3), batch_size=4, steps=60, max_length=_POSITIONS),
    "german": replace(TASKS["german"], learning_rates=(1e-3, 3e-3), batch_size=4, steps=60),
}
"""The tasks by name. The two language tasks are short enough for a computer without a GPU."""


def precision(task: Task) -> AbstractContextManager[Any]:
    """Language models run as they are usually trained, in bfloat16 with adapters in float32, and MiniLM in float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=task.causal)


def forward(task: Task, model: Any, batch: Batch) -> Any:
    """The output of the model for a batch, in the precision of the task."""
    with precision(task):
        return model(**batch)


class Workshop:
    """Trains adapters and loads them again. Reads each model and data set once.

    Attributes:
        source: Folder with the data files.
        models: Model for `True` (causal tasks) and `False` (classification).
        folder: Where the trained adapters are.
    """

    def __init__(self, source: str, models: dict[bool, str], folder: Path) -> None:
        self.source, self.models, self.folder = source, models, folder
        self._splits: dict[str, tuple[Splits, int]] = {}

    def splits(self, task: Task) -> tuple[Splits, int]:
        """The data of a task, and the padding token."""
        if task.name not in self._splits:
            tokenizer = load_tokenizer(self.models[task.causal])
            splits = _splits(task, self.source, tokenizer)
            self._splits[task.name] = splits, tokenizer.pad_token_id
        return self._splits[task.name]

    def base_model(self, run: Run) -> Any:
        """The pretrained model, with the untrained classifier of the run's seed if the task has one."""
        task = BENCHMARK_TASKS[run.task]
        splits, pad = self.splits(task)
        model_path = self.models[task.causal]
        dtype = torch.bfloat16 if task.causal else torch.float32
        model = load_model(task, model_path, splits.num_labels, run.seed, torch.device("cpu"), dtype)
        model.config.pad_token_id = pad
        return model

    def trained(self, run: Run) -> Any:
        """The model with the trained adapter of a run, trained now if it is not there yet."""
        self.train(run)
        return PeftModel.from_pretrained(self.base_model(run), str(self.folder / run.name), is_trainable=True)

    def facts(self, run: Run) -> dict[str, Any]:
        """What was measured when the adapter was trained."""
        content: dict[str, Any] = json.loads((self.folder / run.name / "run.json").read_text())
        return content

    def train(self, run: Run) -> None:
        """Train an adapter, unless its folder has it."""
        task, folder = BENCHMARK_TASKS[run.task], self.folder / run.name
        if (folder / "run.json").exists():
            return
        splits, _ = self.splits(task)
        base = self.base_model(run)
        before = self.measure(base, task, splits.development)
        torch.manual_seed(run.seed)
        config = LoraConfig(
            r=run.r,
            lora_alpha=SCALING * run.r,
            target_modules=task.targets["all-linear"],
            task_type="CAUSAL_LM" if task.causal else "SEQ_CLS",
        )
        model = get_peft_model(base, config)
        self._fit(model, task, run)
        development = self.measure(model, task, splits.development)
        model.save_pretrained(str(folder))
        facts = {"run": asdict(run), "development_before": before, "development": development}
        (folder / "run.json").write_text(json.dumps(facts, indent=2) + "\n")

    def _fit(self, model: Any, task: Task, run: Run) -> None:
        splits, pad = self.splits(task)
        lengths = [len(example.input_ids) for example in splits.train]
        order = training_order(lengths, task.batch_size, task.steps, run.seed)
        data = batches([splits.train[index] for index in order], task.batch_size, pad, torch.device("cpu"))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer, schedule = optimizer_and_schedule(model, run.learning_rate, task.steps)
        model.train()
        for batch in data:
            forward(task, model, batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    def measure(self, model: Any, task: Task, examples: Sequence[Example]) -> float:
        """Mean loss in nats. The model is left in eval mode."""
        _, pad = self.splits(task)
        by_length = sorted(examples, key=lambda example: len(example.input_ids))
        with precision(task):
            return evaluate(model, task, batches(by_length, 4 * task.batch_size, pad, torch.device("cpu")))["loss"]

    def calibration(self, run: Run, num_batches: int) -> list[Batch]:
        """Batches of training examples, in another order than that of the training."""
        task = BENCHMARK_TASKS[run.task]
        splits, pad = self.splits(task)
        lengths = [len(example.input_ids) for example in splits.train]
        order = training_order(lengths, task.batch_size, num_batches, 1000 + run.seed)
        return list(batches([splits.train[index] for index in order], task.batch_size, pad, torch.device("cpu")))


def _splits(task: Task, source: str, tokenizer: Any) -> Splits:
    splits = load_splits(task, source, tokenizer)
    # A question that fills an example leaves no answer, and so no loss.
    train, development, test = (_answered(part) for part in (splits.train, splits.development, splits.test))
    return Splits(train, development, test, splits.num_labels)


def _answered(examples: Sequence[Example]) -> list[Example]:
    return [
        example
        for example in examples
        if isinstance(example.labels, int) or any(label != -100 for label in example.labels[1:])
    ]
