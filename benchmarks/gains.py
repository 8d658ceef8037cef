"""Gains of each method over uniform LoRA, paired by seed, with bootstrap confidence intervals.

A setting is a task, its targets, a rank, a number of steps and a precision. A gain is a method's metric minus that of
uniform LoRA at the same seed, with the sign changed if a lower metric is better. Its unit is accuracy points for
classification, and nats of loss for text. Tasks do not share a unit. Over all tasks, the gain is therefore in percent
of uniform LoRA's metric: the mean over tasks of the mean over the settings of each task. The settings of a task share
their seeds, so the bootstrap draws one set of seeds for all of them.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np

from intervals import interval
from learning_rates import chosen_runs, sweeps_by_method

REFERENCE = "uniform"
METRICS = {
    "banking77": "accuracy",
    "sst2": "accuracy",
    "gsm8k": "loss",
    "german": "loss",
    "banking77-long": "accuracy",
    "gsm8k-long": "loss",
}
"""The main metric of each task."""

UNITS = {"accuracy": "points of accuracy", "loss": "nats"}
"""The unit of a gain in each metric."""

SEEDS = 5
"""The smallest number of seeds with which a method is reported with an interval."""


class Setting(NamedTuple):
    """The conditions under which methods are compared."""

    task: str
    targets: str
    rank: int
    steps: int
    dtype: str = "float32"

    def __str__(self) -> str:
        return self._name(f", r = {self.rank}")

    @property
    def without_rank(self) -> str:
        """The name that settings share if only their ranks differ."""
        return self._name("")

    def _name(self, rank: str) -> str:
        precision = "" if self.dtype == "float32" else f", {self.dtype}"
        return f"{self.task}, {self.targets}{rank}, {self.steps} steps{precision}"


class Gain(NamedTuple):
    """Gain of one method over the reference in one setting at one seed.

    Attributes:
        seed: The seed.
        gain: Difference in the main metric; positive is better.
        percent: The same difference in percent of the reference's metric.
        loss_gain: Difference in test loss, in nats; positive is better.
        params_ratio: Number of adapter parameters divided by that of the reference.
        parameters: Number of adapter parameters.
    """

    seed: int
    gain: float
    percent: float
    loss_gain: float
    params_ratio: float
    parameters: float


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Read the result of every run that `quality.py` wrote below a folder.

    Raises:
        FileNotFoundError: If the folder contains no results.
    """
    results = [json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))]
    if not results:
        raise FileNotFoundError(f"There are no results in {folder}: run benchmarks/quality.py first.")
    return results


def setting_of_run(result: Mapping[str, Any]) -> Setting:
    """The setting of a run. Runs that do not name a precision are in float32."""
    run = result["run"]
    return Setting(run["task"], run["targets"], run["rank"], run["steps"], run.get("dtype", "float32"))


def group_by_setting(results: Iterable[Mapping[str, Any]]) -> dict[Setting, list[Mapping[str, Any]]]:
    """Group runs by setting, and keep the settings in which uniform LoRA was run."""
    groups: dict[Setting, list[Mapping[str, Any]]] = defaultdict(list)
    for result in results:
        groups[setting_of_run(result)].append(result)
    return {
        setting: runs
        for setting, runs in sorted(groups.items())
        if any(run["run"]["method"] == REFERENCE for run in runs)
    }


def score(result: Mapping[str, Any], split: str, metric: str) -> float:
    """A metric of a run, for which higher is better: accuracy in points, or the negative loss."""
    value: float = result[split][metric]
    return 100 * value if metric == "accuracy" else -value


def paired_gains(
    results: Sequence[Mapping[str, Any]], reference: str = REFERENCE
) -> dict[Setting, dict[str, list[Gain]]]:
    """Compare every method with a reference method, seed by seed.

    Args:
        results: All runs.
        reference: The method to compare with.

    Returns:
        For each setting in which the reference was run, and for each method, one gain for each seed that both have.
    """
    gains = {}
    for setting, runs in group_by_setting(results).items():
        chosen = chosen_runs(runs)
        if reference not in chosen:
            continue
        gains[setting] = {
            method: [
                _gain(seed, by_seed[seed], chosen[reference][seed], METRICS[setting.task])
                for seed in sorted(by_seed.keys() & chosen[reference].keys())
            ]
            for method, by_seed in chosen.items()
        }
    return gains


def _gain(seed: int, result: Mapping[str, Any], reference: Mapping[str, Any], metric: str) -> Gain:
    reference_score = score(reference, "test", metric)
    gain = score(result, "test", metric) - reference_score
    return Gain(
        seed,
        gain,
        100 * gain / abs(reference_score),
        score(result, "test", "loss") - score(reference, "test", "loss"),
        result["adapter_parameters"] / reference["adapter_parameters"],
        result["adapter_parameters"],
    )


def seeds_needed(gains: Mapping[Setting, Mapping[str, Sequence[Gain]]], reference: str = REFERENCE) -> int:
    """The number of seeds a method needs to be reported with an interval.

    This is `SEEDS`, or the largest number of seeds that the reference has in any setting if that is smaller.
    """
    return min(SEEDS, max((len(methods[reference]) for methods in gains.values()), default=SEEDS))


def mean_over_settings(groups: Sequence[Sequence[Gain]]) -> list[Gain]:
    """Average, seed by seed, the gains of settings that share their seeds."""
    by_seed: dict[int, list[Gain]] = defaultdict(list)
    for gain in itertools.chain.from_iterable(groups):
        by_seed[gain.seed].append(gain)
    return [Gain(seed, *np.mean([gain[1:] for gain in gains], axis=0).tolist()) for seed, gains in by_seed.items()]


def summary(settings: Mapping[Setting, Sequence[Gain]], unit: str) -> dict[str, Any]:
    """Summarize the gains of one method over several settings.

    Args:
        settings: The gains of each setting, one for each seed.
        unit: `"gain"`, or `"percent"` to compare tasks.

    Returns:
        Mean gain with its interval, mean gain in loss with its interval, mean ratio of parameters, and the numbers of
        runs, settings and tasks.
    """
    by_task: dict[str, list[Sequence[Gain]]] = defaultdict(list)
    for setting, gains in settings.items():
        by_task[setting.task].append(gains)
    groups = [mean_over_settings(task_gains) for task_gains in by_task.values()]
    return {
        "mean_gain": mean(mean(getattr(gain, unit) for gain in group) for group in groups),
        "ci95": list(interval([[getattr(gain, unit) for gain in group] for group in groups])),
        "mean_loss_gain": mean(mean(gain.loss_gain for gain in group) for group in groups),
        "loss_ci95": list(interval([[gain.loss_gain for gain in group] for group in groups])),
        "params_ratio": mean(gain.params_ratio for group in groups for gain in group),
        "runs": sum(map(len, settings.values())),
        "settings": len(settings),
        "tasks": len(by_task),
    }


def gains_report(results: Sequence[Mapping[str, Any]], reference: str = REFERENCE) -> dict[str, Any]:
    """Summarize all gains as JSON types.

    Args:
        results: All runs.
        reference: The method to compare with.

    Returns:
        `overall`: for each method, the summary over the settings in which it has enough seeds. `tasks`: the same for
        the settings of each task. `settings`: for each setting and method, the summary and the number of adapter
        parameters. `few_seeds`: for each setting, `mean_loss_gain` and `runs` of the methods with fewer seeds.
        `not_tuned`: for each setting, the methods whose best learning rate is the smallest or the largest that was
        run.
    """
    gains = paired_gains(results, reference)
    needed = seeds_needed(gains, reference)
    overall: dict[str, dict[Setting, list[Gain]]] = defaultdict(dict)
    tasks: dict[str, dict[str, dict[Setting, list[Gain]]]] = defaultdict(lambda: defaultdict(dict))
    for setting, methods in gains.items():
        for method, seed_gains in methods.items():
            if len(seed_gains) >= needed:
                overall[method][setting] = tasks[setting.task][method][setting] = seed_gains
    return {
        "overall": {method: summary(settings, "percent") for method, settings in overall.items()},
        "tasks": {
            task: {method: summary(settings, "gain") for method, settings in methods.items()}
            for task, methods in tasks.items()
        },
        "settings": {str(setting): _summaries(setting, methods, needed) for setting, methods in gains.items()},
        "few_seeds": {str(setting): _few_seeds(methods, needed) for setting, methods in gains.items()},
        "not_tuned": {
            str(setting): sorted(method for method, sweep in sweeps_by_method(runs).items() if sweep.at_an_end)
            for setting, runs in group_by_setting(results).items()
            if setting in gains
        },
    }


def _summaries(setting: Setting, methods: Mapping[str, Sequence[Gain]], needed: int) -> dict[str, Any]:
    return {
        method: summary({setting: gains}, "gain") | {"parameters": mean(gain.parameters for gain in gains)}
        for method, gains in methods.items()
        if len(gains) >= needed
    }


def _few_seeds(methods: Mapping[str, Sequence[Gain]], needed: int) -> dict[str, Any]:
    return {
        method: {"mean_loss_gain": mean(gain.loss_gain for gain in gains), "runs": len(gains)}
        for method, gains in methods.items()
        if 0 < len(gains) < needed
    }
