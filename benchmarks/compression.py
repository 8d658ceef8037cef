"""Compare criteria for shrinking trained adapters, at equal size, in held-out loss.

Adapters are trained by PEFT, at ranks 16 and 64, at a tuned and at the customary learning rate. Every criterion then
truncates the same adapter, and the loss on the test split is measured. Beside them stands an adapter trained at
that size. There is one result file for each adapter, to which missing criteria are added, so that a
run can be interrupted and go on:

    pip download --no-deps --no-binary :all: plone.app.locales   # plone.po, the German text, is inside
    python benchmarks/compression.py --data FOLDER --encoder FOLDER --decoder FILE.gguf --work FOLDER

With `--report` only the results are read and printed; `--json` prints them as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compression_criteria import CRITERIA, OURS, PARA, Adapter, Selection
from compression_report import TRAINED_AT_SIZE, format_report, summary
from compression_training import BENCHMARK_TASKS, CUSTOMARY_LEARNING_RATE, Run, Workshop, forward
from fim_lora.adapter.plain_adapter import plain_adapters
from fim_lora.adapter.truncate import core_map, truncated_weights
from fim_lora.spectrum import adapted_layers, checked_layers, path_moments
from quality_tasks import Batch, Task, batches

SIZES = (2, 4, 8, 16)
"""The adapter is truncated to one part in this many of its parameters."""

CALIBRATION_BATCHES = 24
TEST_EXAMPLES = {"banking77": 512, "gsm8k": 48, "german": 48}
RESULTS = Path(__file__).parent / "results" / "compression"


def measure(workshop: Workshop, run: Run, criteria: Sequence[str], file: Path) -> None:
    """Measure those criteria at every size that the result file of a run does not have, and add them to it.

    The adapter is trained if needed. The file has losses as sums over batches, so that intervals can be computed.
    """
    result = json.loads(file.read_text()) if file.exists() else {}
    missing = [name for name in criteria if name not in result.get("criteria", {})]
    if not missing:
        return
    task = BENCHMARK_TASKS[run.task]
    model, test = workshop.trained(run), _test_batches(workshop, run)
    layers = checked_layers(model, "default")
    start = time.perf_counter()
    adapter = _adapter(model, layers, workshop.calibration(run, CALIBRATION_BATCHES), task)
    seconds = time.perf_counter() - start
    result = result or _facts(workshop, run, adapter, seconds) | {"whole": _losses(model, test, task)}
    for name in missing:
        if name == TRAINED_AT_SIZE:
            found = {"sizes": {str(size): _trained_at(workshop, run, size, test) for size in SIZES}}
        else:
            found = _cut(model, layers, adapter, name, test, task)
        result["criteria"][name] = found
        increases = {size: _increase(one["losses"], result["whole"]) for size, one in found["sizes"].items()}
        print(run.name, name, {size: round(increase, 4) for size, increase in increases.items()}, flush=True)
        file.write_text(json.dumps(result) + "\n")


def _facts(workshop: Workshop, run: Run, adapter: Adapter, seconds: float) -> dict[str, Any]:
    facts = workshop.facts(run)
    return {
        "run": asdict(run),
        "parameters": adapter.num_parameters,
        "calibration_batches": CALIBRATION_BATCHES,
        "calibration_seconds": seconds,
        "development": facts["development"],
        "development_before": facts["development_before"],
        "criteria": {},
    }


def _test_batches(workshop: Workshop, run: Run) -> list[Batch]:
    task = BENCHMARK_TASKS[run.task]
    splits, pad = workshop.splits(task)
    examples = sorted(splits.test[: TEST_EXAMPLES[run.task]], key=lambda example: len(example.input_ids))
    return list(batches(examples, task.batch_size, pad, torch.device("cpu")))


def _trained_at(workshop: Workshop, run: Run, size: int, test: Sequence[Batch]) -> dict[str, Any]:
    """The loss of an adapter of this size that was trained like that of the run."""
    smaller = replace(run, r=run.r // size)
    model = workshop.trained(smaller)
    parameters = sum(value.numel() for name, value in model.named_parameters() if "lora_" in name)
    losses = _losses(model, test, BENCHMARK_TASKS[run.task])
    return {"parameters": parameters, "largest_rank": smaller.r, "losses": losses}


def _cut(
    model: Any, layers: Mapping[str, Any], adapter: Adapter, criterion: str, test: Sequence[Batch], task: Task
) -> dict[str, Any]:
    """What a criterion keeps at every size, and the losses; with the seconds that the choice took."""
    start = time.perf_counter()
    selection = CRITERIA[criterion](adapter)
    seconds = time.perf_counter() - start
    sizes = {str(size): _at_size(model, layers, adapter, selection, size, test, task) for size in SIZES}
    return {"seconds": seconds, "sizes": sizes}


def _adapter(model: Any, layers: Mapping[str, Any], calibration: Sequence[Batch], task: Task) -> Adapter:
    adapted, plain = adapted_layers(model, layers, "default"), plain_adapters(layers, "default")
    moments = path_moments(
        model,
        adapted,
        plain,
        calibration,
        "default",
        len(calibration),
        partial(forward, task),
        show_progress_bar=False,
    )
    return Adapter(plain, moments, {name: layer.weight_shape.rank_parameters for name, layer in adapted.items()})


def _at_size(
    model: Any,
    layers: Mapping[str, Any],
    adapter: Adapter,
    selection: Selection,
    size: int,
    test: Sequence[Batch],
    task: Task,
) -> dict[str, Any]:
    kept = selection.keep(adapter.num_parameters // size)
    maps = {name: core_map(basis.left, basis.right, kept[name]) for name, basis in selection.bases.items()}
    with truncated_weights(layers, "default", maps):
        losses = _losses(model, test, task)
    ranks = {name: len(numbers) for name, numbers in kept.items()}
    parameters = sum(rank * adapter.costs[name] for name, rank in ranks.items())
    return {"parameters": parameters, "largest_rank": max(ranks.values()), "losses": losses}


@torch.no_grad()
def _losses(model: Any, test: Sequence[Batch], task: Task) -> list[tuple[float, int]]:
    """Sum of the losses, and their number, of every batch."""
    model.eval()
    found = []
    for batch in test:
        labels = batch["labels"][:, 1:] if task.causal else batch["labels"]
        terms = int((labels != -100).sum())
        found.append((float(forward(task, model, batch).loss) * terms, terms))
    return found


def _increase(losses: Sequence[tuple[float, int]], whole: Sequence[tuple[float, int]]) -> float:
    first, second = (np.sum(one, axis=0) for one in (losses, whole))
    return float(first[0] / first[1] - second[0] / second[1])


def planned_runs(workshop: Workshop, tasks: Sequence[str], ranks: Sequence[int], seeds: Sequence[int]) -> list[Run]:
    """Every adapter of the comparison, with the tuned learning rate of its task and rank and the customary one."""
    runs = []
    for task in tasks:
        for r in ranks:
            rates = (tuned_learning_rate(workshop, task, r), CUSTOMARY_LEARNING_RATE)
            runs += [Run(task, r, rate, seed) for seed in seeds for rate in rates]
    return runs


def tuned_learning_rate(workshop: Workshop, task: str, r: int) -> float:
    """The learning rate of the grid with the lowest loss on the development split for this rank, with seed 0."""
    losses = {}
    for rate in BENCHMARK_TASKS[task].learning_rates:
        run = Run(task, r, rate, 0)
        workshop.train(run)
        losses[rate] = workshop.facts(run)["development"]
    return min(losses, key=losses.__getitem__)


def main() -> None:
    """The command line."""
    compared = [*CRITERIA, TRAINED_AT_SIZE]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the data files and plone.po")
    parser.add_argument("--encoder", help="MiniLM: folder or hub id")
    parser.add_argument("--decoder", help="SmolLM2: GGUF file, folder or hub id")
    parser.add_argument("--work", type=Path, help="folder for the trained adapters")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tasks", nargs="+", default=list(BENCHMARK_TASKS), choices=list(BENCHMARK_TASKS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--criteria", nargs="+", default=compared, choices=compared)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--report", action="store_true", help="only print the results")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    arguments = parser.parse_args()
    if not arguments.report:
        torch.set_num_threads(arguments.threads)
        models = {True: arguments.decoder, False: arguments.encoder}
        workshop = Workshop(arguments.data, models, arguments.work)
        arguments.results.mkdir(parents=True, exist_ok=True)
        for run in planned_runs(workshop, arguments.tasks, arguments.ranks, arguments.seeds):
            measure(workshop, run, arguments.criteria, arguments.results / f"{run.name}.json")
    results = [json.loads(file.read_text()) for file in sorted(arguments.results.glob("*.json"))]
    found = summary(results, SIZES, OURS, PARA)
    print(json.dumps(found, indent=2) if arguments.json else format_report(found))


if __name__ == "__main__":
    main()
