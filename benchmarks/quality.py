"""Train adapters of equal size with every method; each seed has the same data, data order and initial classifier.

    python benchmarks/quality.py --data FOLDER --encoder FOLDER --decoder FILE.gguf
    python benchmarks/quality.py --data FOLDER --encoder FOLDER --quick     # one small comparison, ten minutes

A run is one task, targets, rank, method, learning rate and seed. It writes one JSON file below `--results`. A run that
has a file is not repeated, so the command can be stopped and started again, and several commands can share the work
(`--share 1/2`). Files are never overwritten. `benchmarks/report.py` makes tables and plots from them.

With the same seed, all methods have the same number of steps, the same schedule, the same batches in the same order,
the same initial classifier values and the same calibration batches, which come from the training split.

The learning rate of every method is tuned separately by one rule. With the first seed, the method is run with every
learning rate of the grid. While the rate with the lowest loss on the development split is the smallest or the largest
that was run, the next rate beyond it, larger or smaller by a factor of two, is run as well, at most four times
(`--extra-rates`). A grid that suits one method therefore does not limit another. The loss on the development split is
never reported. With all further seeds, only the best learning rate is run.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from quality_methods import METHODS as COMPARED_METHODS
from quality_results import Results, Run
from quality_tasks import DEFAULT_TASKS, HUB, TASKS
from quality_training import METHODS, Bench, environment

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
"""The defaults of the other options with `--quick`."""


def shared_settings(options: argparse.Namespace) -> list[list[Run]]:
    """The share of the work that this command does.

    Returns:
        For each task, targets and rank: one run for each method of this share, with the first seed and without a
        learning rate.
    """
    part, parts = map(int, options.share.split("/"))
    product = itertools.product(options.tasks, options.targets, options.ranks, options.methods)
    runs = [
        Run(task, targets, rank, method, 0.0, options.seeds[0], options.steps or TASKS[task].steps, options.dtype)
        for task, targets, rank, method in list(product)[part - 1 :: parts]
    ]
    return [list(group) for _, group in itertools.groupby(runs, key=lambda run: run.file.parent)]


def run_all(options: argparse.Namespace, results: Results) -> None:
    """Tune all methods of a setting, then run them seed by seed, so that partial results are already comparable."""
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


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, by default that of this process. `--quick` changes the defaults to `QUICK`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help=f"folder with the files of the tasks, or {HUB!r}")
    parser.add_argument("--encoder", default="sentence-transformers/all-MiniLM-L6-v2", help="hub id or folder")
    parser.add_argument("--decoder", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id, folder or GGUF file")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "quality")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="precision of the model; adapters are in float32",
    )
    _add_grid_options(parser)
    _add_tuning_options(parser)
    if parser.parse_args(arguments).quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args(arguments)


def _add_grid_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a small grid, with results in a separate folder")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=DEFAULT_TASKS)
    parser.add_argument(
        "--targets", nargs="+", choices=["attention", "all-linear"], default=["attention", "all-linear"]
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 8])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(COMPARED_METHODS))
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=list(range(5)), help="the first one selects the learning rate"
    )
    parser.add_argument("--steps", type=int, help="training steps; default: those of the task")
    parser.add_argument(
        "--share", default="1/1", help="K/N: run every N-th combination of setting and method, starting with the K-th"
    )


def _add_tuning_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--learning-rates", nargs="+", type=float, help="learning rates to start with; default: those of the task"
    )
    parser.add_argument(
        "--extra-rates",
        type=int,
        default=4,
        help="at most this many learning rates outside the grid, while the best one is at an end (%(default)s)",
    )
    parser.add_argument("--tuning-only", action="store_true", help="run the first seed only")
    parser.add_argument(
        "--exact-match",
        type=int,
        default=0,
        metavar="N",
        help="answer the first N test questions, if the task asks any; not in runs that only select a learning rate, "
        "which are those of the first seed if several seeds are given",
    )


def main() -> None:
    """Run everything that has no result yet."""
    options = parse_options()
    models = {True: options.decoder, False: options.encoder}
    bench = Bench(options.data, models, options.device)
    run_environment = environment(options.data, models)
    # The total is unknown until all learning rates are tuned.
    with tqdm(unit="run") as progress:

        def make(run: Run, tuning: bool) -> dict[str, Any]:
            progress.set_postfix_str(str(run.file), refresh=True)
            result = bench.result(run, 0 if tuning else options.exact_match)
            progress.update()
            return result | {"environment": run_environment}

        run_all(options, Results(options.results, make))


if __name__ == "__main__":
    main()
