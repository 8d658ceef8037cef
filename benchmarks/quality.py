"""What ranks gain: trains adapters of equal size by every method, with the same data, order and classifier per seed.

    python benchmarks/quality.py --data FOLDER --encoder FOLDER --decoder FILE.gguf
    python benchmarks/quality.py --data FOLDER --encoder FOLDER --quick     # one small comparison, ten minutes

One run is one task, targets, rank, method, learning rate and seed. It writes one JSON file below `--results`; what has
its file is not run again, so the command can be stopped and started, and several can share the work (`--share 1/2`).
Nothing is overwritten. `benchmarks/report.py` makes tables and plots of them.

Every method sees the same steps, schedule, batches in the same order and classifier values per seed, and the same
calibration batches, which come from the training split.

The learning rate is tuned for every method on its own, by the same rule. With the first seed, a method is run with
every learning rate of the grid. As long as the one with the lowest loss on the development split, which is never
reported on, is the largest or the smallest of those that were run, the next one beyond it, by a factor of two, is
run, too, but at most four of them (`--extra-rates`). So no method is held at an end of a grid that suits another one
better. With the other seeds it is then run with its best learning rate only.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from quality_methods import METHODS as COMPARED
from quality_methods import Setting, adapter_parameters
from quality_tasks import (
    DEFAULT_TASKS,
    HUB,
    TASKS,
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
from report import TUNED_BY, best_rate

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
ANSWERED_AT_ONCE = 16

QUICK: dict[str, Any] = {
    "results": Path(__file__).parent / "results" / "quality-quick",
    "tasks": ["banking77"],
    "targets": ["all-linear"],
    "ranks": [2],
    "methods": [
        "uniform", "fim-rank", "fim-parameters", "random", "lora_B-gradient", "eva-rho-2", "adalora", "lora-ga",
    ],
    "seeds": [0, 1],
    "steps": 60,
    "learning_rates": [2e-3, 4e-3],
    "extra_rates": 0,
}  # fmt: skip
"""What `--quick` means for the options that are not given."""

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
        dtype: Precision of the pretrained model; what is trained is in float32.
    """

    task: str
    targets: str
    rank: int
    method: str
    learning_rate: float
    seed: int
    steps: int
    dtype: str = "float32"

    @property
    def file(self) -> Path:
        """Where the result goes, below the folder of results."""
        method = self.method.replace("/", "_")
        name = f"{method}-lr{self.learning_rate:g}-seed{self.seed}.json"
        precision = "" if self.dtype == "float32" else f"-{self.dtype}"
        return Path(self.task) / f"{self.targets}-r{self.rank}-{self.steps}steps{precision}" / name


class Bench:
    """Models and data, read once."""

    def __init__(self, source: str, models: dict[bool, str], device: torch.device) -> None:
        self.source, self.models, self.device = source, models, device
        self._splits: dict[str, tuple[Splits, Any]] = {}
        self._last_key: Run | None = None
        self._last_adapted: tuple[Any, float] = None, 0.0

    def splits(self, task: Task) -> tuple[Splits, Any]:
        """The data of a task and the tokenizer."""
        if task.name not in self._splits:
            tokenizer = load_tokenizer(self.models[task.causal])
            self._splits[task.name] = load_splits(task, self.source, tokenizer), tokenizer
        return self._splits[task.name]

    def result(self, run: Run, num_answers: int = 0) -> dict[str, Any]:
        """Train and measure.

        Args:
            run: The run.
            num_answers: Test questions to answer for the exact match, if the task asks questions.

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
        part = splits.development[:MEASURED_ON]
        for step, taken in self._train(model, task, run, batches(chosen[: run.steps * size], size, pad, self.device)):
            seconds += taken
            if step % MEASURED_EVERY == 0 and step < run.steps:
                curve.append([step, self._measure(model, task, part, pad)["loss"]])
        development = self._measure(model, task, splits.development, pad)
        if run.steps % MEASURED_EVERY == 0:
            # Of a small split the part is the whole, which is not measured twice.
            last = development if len(part) == len(splits.development) else self._measure(model, task, part, pad)
            curve.append([run.steps, last["loss"]])
        test = self._measure(model, task, splits.test, pad)
        if task.causal and num_answers:
            questions = splits.test[:num_answers]
            test["exact_match"] = exact_match(model, questions, tokenizer, ANSWERED_AT_ONCE, self.device)
            test["exact_match_examples"] = len(questions)
        return {
            "run": asdict(run),
            "development": development,
            "test": test,
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
        dtype = getattr(torch, run.dtype)
        model = load_model(task, self.models[task.causal], splits.num_labels, run.seed, self.device, dtype)
        model.config.pad_token_id = pad
        calibration = list(batches(self._chosen(run)[: CALIBRATION_BATCHES * size], size, pad, self.device))
        task_type = "CAUSAL_LM" if task.causal else "SEQ_CLS"
        start = self._now()
        setting = Setting(model, task.targets[run.targets], run.rank, task_type, calibration, run.steps, run.seed)
        adapted = METHODS[run.method](setting)
        return adapted, self._now() - start

    def _now(self) -> float:
        """Seconds, after what a GPU has still to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

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
            start = self._now()
            model.train()
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            if update_ranks is not None:
                update_ranks(step)
            optimizer.zero_grad()
            yield step + 1, self._now() - start

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


def environment(source: str, models: Mapping[bool, str]) -> dict[str, Any]:
    """What a result depends on beside its run.

    Args:
        source: Where the data come from.
        models: Whether causal to the model, a hub id or a path, of which only the name is noted.

    Returns:
        Git revision, versions, processor and its widest instructions, models and data.
    """
    command = ["git", "describe", "--always", "--dirty"]
    described = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {name: importlib.metadata.version(name) for name in _VERSIONS_OF}
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


def shared_settings(options: argparse.Namespace) -> list[list[Run]]:
    """The part of the work that is this command's.

    Args:
        options: From the command line.

    Returns:
        For each task, targets and rank, in which methods are compared, one run for each method that falls to this
        share, with the first seed and no learning rate yet.
    """
    part, parts = map(int, options.share.split("/"))
    product = itertools.product(options.tasks, options.targets, options.ranks, options.methods)
    runs = [
        Run(task, targets, rank, method, 0.0, options.seeds[0], options.steps or TASKS[task].steps, options.dtype)
        for task, targets, rank, method in list(product)[part - 1 :: parts]
    ]
    return [list(group) for _, group in itertools.groupby(runs, key=lambda run: run.file.parent)]


def tuned_rate(
    known: Mapping[float, float], grid: Sequence[float], extra_rates: int, loss_of: Callable[[float], float]
) -> float:
    """Choose a learning rate: the grid, and on from its end as long as the best one is there.

    Args:
        known: Learning rates that were run before, in the grid or not, to loss on the development split.
        grid: The grid to start from.
        extra_rates: How many rates beside the grid may be run, with those that were run before.
        loss_of: Runs a learning rate, and returns its loss.

    Returns:
        The best one.
    """
    losses = dict(known)
    for rate in grid:
        losses[rate] = losses[rate] if rate in losses else loss_of(rate)
    while len(losses.keys() - set(grid)) < extra_rates:
        rate = best_rate(losses)
        if rate not in (min(losses), max(losses)):
            break
        beyond = 2 * rate if rate == max(losses) else rate / 2
        losses[beyond] = loss_of(beyond)
    return best_rate(losses)


class Results:
    """The files of the results, which are made where they are missing."""

    def __init__(self, folder: Path, make: Callable[[Run, bool], dict[str, Any]]) -> None:
        self.folder, self.make = folder, make

    def get(self, run: Run, *, tuning: bool) -> dict[str, Any]:
        """Read a result, or run and write it.

        Args:
            run: The run.
            tuning: Whether it is only to choose a learning rate.

        Returns:
            The content of its file.
        """
        path = self.folder / run.file
        if not path.exists():
            content = self.make(run, tuning)
            with suppress(FileExistsError):  # another process was faster
                write(path, content)
        written: dict[str, Any] = json.loads(path.read_text())
        return written

    def known_losses(self, run: Run) -> dict[float, float]:
        """The learning rates that there are.

        Args:
            run: A run, whose learning rate does not matter.

        Returns:
            Learning rate to loss on the development split.
        """
        file = self.folder / run.file
        pattern = file.name.replace(f"-lr{run.learning_rate:g}-", "-lr*-")
        found = [json.loads(path.read_text()) for path in file.parent.glob(pattern)]
        return {content["run"]["learning_rate"]: content["development"][TUNED_BY] for content in found}

    def tuned(self, run: Run, grid: Sequence[float], extra_rates: int, *, tuning: bool) -> Run:
        """Tune a run.

        Args:
            run: The run, without a learning rate.
            grid: The learning rates to start from.
            extra_rates: How many beside them.
            tuning: Whether its runs are only to choose a learning rate.

        Returns:
            The run with its best learning rate.
        """

        def loss_of(rate: float) -> float:
            content = self.get(replace(run, learning_rate=rate), tuning=tuning)
            loss: float = content["development"][TUNED_BY]
            return loss

        return replace(run, learning_rate=tuned_rate(self.known_losses(run), grid, extra_rates, loss_of))


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


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options.

    Args:
        arguments: Of the command line; `None` for those of this process.

    Returns:
        The options, with those of `QUICK` where they are asked for and nothing else is given.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help=f"folder with the files of the tasks, or {HUB!r}")
    parser.add_argument("--encoder", default="sentence-transformers/all-MiniLM-L6-v2", help="hub id or folder")
    parser.add_argument("--decoder", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id, folder or GGUF file")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "quality")
    parser.add_argument("--quick", action="store_true", help="a small grid, with results in a folder of its own")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=DEFAULT_TASKS)
    parser.add_argument(
        "--targets", nargs="+", choices=["attention", "all-linear"], default=["attention", "all-linear"]
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 8])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(COMPARED))
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=list(range(5)), help="the first one chooses the learning rate"
    )
    parser.add_argument(
        "--learning-rates", nargs="+", type=float, help="the grid to start from, instead of the task's"
    )
    parser.add_argument("--extra-rates", type=int, default=4, help="how many more, beyond an end that is the best")
    parser.add_argument("--tuning-only", action="store_true", help="only the first seed")
    parser.add_argument("--steps", type=int, help="instead of those of the task")
    parser.add_argument(
        "--exact-match",
        type=int,
        default=0,
        metavar="N",
        help="answer the first N test questions, if the task asks any; not in runs that only choose a learning rate, "
        "which are those of the first seed where there are others",
    )
    parser.add_argument("--share", default="1/1", help="K/N: only every N-th method and setting, from the K-th on")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="of the model; adapters are in float32"
    )
    if parser.parse_args(arguments).quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args(arguments)


def run_all(options: argparse.Namespace, results: Results) -> None:
    """Tune every method of a setting, and then run them seed by seed, so that a part of it is already a comparison.

    Args:
        options: From the command line.
        results: What there is, and what makes the rest.
    """
    seeds = [] if options.tuning_only else options.seeds[1:]
    for runs in shared_settings(options):
        tuned = [
            results.tuned(
                run,
                options.learning_rates or TASKS[run.task].learning_rates,
                options.extra_rates,
                tuning=len(options.seeds) > 1,
            )
            for run in runs
        ]
        for seed, run in itertools.product(seeds, tuned):
            results.get(replace(run, seed=seed), tuning=False)


def main() -> None:
    """Run what has no result yet."""
    options = parsed()
    models = {True: options.decoder, False: options.encoder}
    bench = Bench(options.data, models, options.device)
    about = environment(options.data, models)
    # How many runs there will be is known when all learning rates are.
    with tqdm(unit="run") as progress:

        def make(run: Run, tuning: bool) -> dict[str, Any]:
            progress.set_postfix_str(str(run.file), refresh=True)
            result = bench.result(run, 0 if tuning else options.exact_match)
            progress.update()
            return result | {"environment": about}

        run_all(options, Results(options.results, make))


if __name__ == "__main__":
    main()
