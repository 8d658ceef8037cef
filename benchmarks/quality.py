"""What ranks gain: trains adapters of equal size by every method, with the same data, order and classifier per seed.

    python benchmarks/quality.py --data FOLDER --encoder FOLDER --decoder FILE.gguf

One run is one task, targets, rank, method, learning rate and seed. It writes one JSON file below `--results`; what has
its file is not run again, so the command can be stopped and started, and several can share the work (`--share 1/2`).
Nothing is overwritten. `benchmarks/report.py` makes tables and plots of them.

Every method sees the same learning rates, steps, schedule, batches in the same order and classifier values per seed,
and the same calibration batches, which come from the training split. The learning rate of a method is chosen by the
report on the development split, which is never reported on.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from quality_methods import METHODS as COMPARED
from quality_methods import Setting, adapter_parameters
from quality_tasks import (
    HUB,
    TASKS,
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
from quality_variants import VARIANTS
from report import TUNED_BY, score

METHODS = COMPARED | VARIANTS
"""Name to method."""

WARM_UP = 0.1
"""Share of the steps in which the learning rate rises; then it falls linearly to zero."""

CLASSIFIER_LEARNING_RATE = 1e-2
"""Of a new classifier, for all methods. With one learning rate for both, a classifier that starts from nothing would
decide which learning rate is the best for the adapter."""

CALIBRATION_BATCHES = 8
MEASURED_EVERY = 20
"""Steps between two measurements of the loss on the first `MEASURED_ON` examples of the development split."""

MEASURED_ON = 128

_MOST_SEEDS = 100
_VERSIONS_OF = ("fim-lora", "peft", "transformers", "torch")


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        task: Name of the task.
        targets: `"attention"` or `"all-linear"`.
        rank: Rank of uniform LoRA.
        method: Name of the method.
        learning_rate: Peak.
        seed: Of everything that is random.
        steps: Training steps.
    """

    task: str
    targets: str
    rank: int
    method: str
    learning_rate: float
    seed: int
    steps: int

    @property
    def file(self) -> Path:
        """Where the result goes, below the folder of results."""
        method = self.method.replace("/", "_")
        name = f"{method}-lr{self.learning_rate:g}-seed{self.seed}.json"
        return Path(self.task) / f"{self.targets}-r{self.rank}-{self.steps}steps" / name


class Bench:
    """Models and data, read once."""

    def __init__(self, source: str, models: dict[bool, str], device: torch.device, dtype: torch.dtype) -> None:
        self.source, self.models, self.device, self.dtype = source, models, device, dtype
        self._splits: dict[str, tuple[Splits, Any]] = {}
        self._last_key: Run | None = None
        self._last_adapted: tuple[Any, float] = None, 0.0

    def splits(self, task: Task) -> tuple[Splits, Any]:
        """The data of a task and the tokenizer."""
        if task.name not in self._splits:
            tokenizer = load_tokenizer(self.models[task.causal])
            self._splits[task.name] = load_splits(task, self.source, tokenizer), tokenizer
        return self._splits[task.name]

    def result(self, run: Run) -> dict[str, Any]:
        """Train and measure.

        Args:
            run: The run.

        Returns:
            The content of its file.
        """
        task = TASKS[run.task]
        splits, tokenizer = self.splits(task)
        size, pad = task.batch_size, tokenizer.pad_token_id
        chosen = self._chosen(run)
        model, calibration_seconds = self._adapted(run)
        initial_parameters = adapter_parameters(model)

        curve, seconds = [], 0.0
        for step, taken in self._train(model, task, run, batches(chosen[: run.steps * size], size, pad, self.device)):
            seconds += taken
            if step % MEASURED_EVERY == 0:
                part = splits.development[:MEASURED_ON]
                curve.append([step, self._measure(model, task, part, pad)["loss"]])
        development = self._measure(model, task, splits.development, pad)
        return {
            "run": asdict(run),
            "development": development,
            "test": self._measure(model, task, splits.test, pad),
            "curve": curve,
            "adapter_parameters": adapter_parameters(model),
            "initial_adapter_parameters": initial_parameters,
            "calibration_seconds": calibration_seconds,
            "training_seconds": seconds,
        }

    def _chosen(self, run: Run) -> list[Example]:
        """The examples that are trained on, of which the first are the calibration batches."""
        task = TASKS[run.task]
        train = self.splits(task)[0].train
        lengths = [len(example.input_ids) for example in train]
        num_batches = max(run.steps, CALIBRATION_BATCHES)
        return [train[index] for index in training_order(lengths, task.batch_size, num_batches, run.seed)]

    def _adapted(self, run: Run) -> tuple[Any, float]:
        """The model with a fresh adapter, and the seconds that its method took.

        Both do not depend on the learning rate, and so the last ones are kept.
        """
        key = replace(run, learning_rate=0.0)
        if key != self._last_key:
            self._last_adapted, self._last_key = self._made(run), key
        model, seconds = self._last_adapted
        return copy.deepcopy(model), seconds

    def _made(self, run: Run) -> tuple[Any, float]:
        task = TASKS[run.task]
        splits, tokenizer = self.splits(task)
        size, pad = task.batch_size, tokenizer.pad_token_id
        model = load_model(task, self.models[task.causal], splits.num_labels, run.seed, self.device, self.dtype)
        model.config.pad_token_id = pad
        calibration = list(batches(self._chosen(run)[: CALIBRATION_BATCHES * size], size, pad, self.device))
        task_type = "CAUSAL_LM" if task.causal else "SEQ_CLS"
        start = time.perf_counter()
        setting = Setting(model, task.targets[run.targets], run.rank, task_type, calibration, run.steps, run.seed)
        return METHODS[run.method](setting), time.perf_counter() - start

    def _train(self, model: Any, task: Task, run: Run, data: Iterator[Any]) -> Iterator[tuple[int, float]]:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(_parameter_groups(model, run.learning_rate), weight_decay=0.0)
        warm_up = max(1, round(WARM_UP * run.steps))
        schedule = LambdaLR(
            optimizer, lambda step: min((step + 1) / warm_up, (run.steps - step) / max(1, run.steps - warm_up))
        )
        update_ranks = getattr(getattr(model, "base_model", None), "update_and_allocate", None)
        torch.manual_seed(2000 + run.seed)
        for step, batch in enumerate(data):
            start = time.perf_counter()
            model.train()
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            if update_ranks is not None:
                update_ranks(step)
            optimizer.zero_grad()
            yield step + 1, time.perf_counter() - start

    def _measure(self, model: Any, task: Task, examples: Sequence[Any], pad: int) -> dict[str, float]:
        # Of similar length in a batch, which saves most of the padding and changes no number.
        by_length = sorted(examples, key=lambda example: len(example.input_ids))
        return evaluate(model, task, batches(by_length, 4 * task.batch_size, pad, self.device))


def _parameter_groups(model: Any, learning_rate: float) -> list[dict[str, Any]]:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapter = [parameter for name, parameter in trained.items() if "lora_" in name]
    classifier = [parameter for name, parameter in trained.items() if "lora_" not in name]
    groups = [{"params": adapter, "lr": learning_rate}, {"params": classifier, "lr": CLASSIFIER_LEARNING_RATE}]
    return [group for group in groups if group["params"]]


def environment() -> dict[str, Any]:
    """What a result depends on beside its run.

    Returns:
        Git revision, versions, processor.
    """
    command = ["git", "describe", "--always", "--dirty"]
    described = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {name: importlib.metadata.version(name) for name in _VERSIONS_OF}
    return {"revision": described.stdout.strip(), "versions": versions, "machine": platform.machine(), "gpu": gpu}


def planned_runs(options: argparse.Namespace) -> list[Run]:
    """The grid, seed by seed, so that a part of it is already a comparison.

    Args:
        options: From the command line.

    Returns:
        The runs.
    """
    part, parts = map(int, options.share.split("/"))
    runs = []
    product = itertools.product(options.seeds, options.tasks, options.targets, options.ranks, options.methods)
    for seed, name, targets, rank, method in list(product)[part - 1 :: parts]:
        task = TASKS[name]
        steps = options.steps or task.steps
        rates = options.learning_rates or task.learning_rates
        run = Run(name, targets, rank, method, 0.0, seed, steps)
        if options.tuned:
            rates = [tuned_learning_rate(options.results, run, rates)]
        runs += [replace(run, learning_rate=rate) for rate in rates]
    return runs


def tuned_learning_rate(folder: Path, run: Run, rates: Sequence[float]) -> float:
    """The best learning rate by the development split, over the seeds that were run with all of them.

    Args:
        folder: The results.
        run: A run, whose learning rate and seed do not matter.
        rates: The grid.

    Returns:
        One of the rates.

    Raises:
        FileNotFoundError: If no seed was run with the whole grid.
    """
    scores: dict[float, list[float]] = {rate: [] for rate in rates}
    for seed in range(_MOST_SEEDS):
        files = {rate: folder / replace(run, learning_rate=rate, seed=seed).file for rate in rates}
        if all(file.exists() for file in files.values()):
            for rate, file in files.items():
                scores[rate].append(score(json.loads(file.read_text()), "development", TUNED_BY))
    if not scores[rates[0]]:
        raise FileNotFoundError(f"No seed of {run.file.parent} was run by {run.method} with all of {rates}.")
    return max(rates, key=lambda rate: mean(scores[rate]))


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a result, whole or not at all, and never over another one.

    Args:
        path: The file.
        content: The result.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(content) + "\n")
    try:
        os.link(temporary, path)
    finally:
        temporary.unlink()


def main() -> None:
    """Run what has no result yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help=f"folder with the files of the tasks, or {HUB!r}")
    parser.add_argument("--encoder", default="sentence-transformers/all-MiniLM-L6-v2", help="hub id or folder")
    parser.add_argument("--decoder", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id, folder or GGUF file")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "quality")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--targets", nargs="+", choices=["attention", "all-linear"], default=["attention", "all-linear"]
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 8])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(COMPARED))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--learning-rates", nargs="+", type=float, help="instead of those of the task")
    parser.add_argument("--steps", type=int, help="instead of those of the task")
    parser.add_argument("--tuned", action="store_true", help="only the learning rate that is the best so far")
    parser.add_argument("--share", default="1/1", help="K/N: only every N-th part of the work, from the K-th on")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    runs = planned_runs(options)
    missing = [run for run in runs if not (options.results / run.file).exists()]
    print(f"{len(missing)} of {len(runs)} runs to do")
    bench = Bench(
        options.data, {True: options.decoder, False: options.encoder}, options.device, getattr(torch, options.dtype)
    )
    about = environment() | {"dtype": options.dtype}
    for run in tqdm(missing):
        write(options.results / run.file, bench.result(run) | {"environment": about})


if __name__ == "__main__":
    main()
