"""What the runs of `quality.py` say: gains over uniform LoRA, paired by seed, with bootstrap confidence intervals.

    python benchmarks/report.py           # tables, as Markdown
    python benchmarks/report.py --json    # the same numbers, for programs
    python benchmarks/report.py --docs docs    # tables and plots of docs/evidence.md

A setting is a task, targets, a rank, a number of steps and a precision. In each, the learning rate of a method is the
one with the lowest loss on the development split with the first seed, which is the one that was run with the most
learning rates; what is reported comes from the test split, which nothing was chosen on. A gain is a method's metric
minus uniform LoRA's at the same seed, with the sign turned where less is better: in accuracy points for classes, in
nats of loss for text. Overall, over tasks, which have no unit in common, it is in percent of uniform LoRA's metric:
the mean over tasks of the mean over the settings of a task. These share their seeds, so seeds are drawn for all of
them.

Gains are reported with an interval (`intervals.py`) where there are five seeds, or as many as uniform LoRA has
anywhere, if that is less. Methods with fewer seeds in a setting are named below its table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np

from intervals import interval, interval_of_seeds

REFERENCE = "uniform"
METRICS = {
    "banking77": "accuracy",
    "sst2": "accuracy",
    "gsm8k": "loss",
    "banking77-long": "accuracy",
    "gsm8k-long": "loss",
}
"""Task to main metric."""

UNITS = {"accuracy": "points of accuracy", "loss": "nats"}
"""Metric to the unit of a gain."""

TUNED_BY = "loss"
"""What the learning rate is chosen by: on a few hundred examples the loss tells learning rates apart that the
accuracy does not."""

SEEDS = 5
"""Of a method in a setting, from which on it is reported with an interval."""

REFERENCE_RANK = 8
"""Of uniform LoRA, whose loss methods of other sizes are compared with."""

_RANKS_OF_A_CURVE = 3


_OVERALL = (
    "The mean over tasks of the mean over the settings of a task. Rows over other numbers of tasks or settings are "
    "means over others: do not compare them."
)
_NOT_TUNED = "Not tuned, because the best learning rate is at an end of those that were run"
_OF_ONE_TASK = "Rows over other numbers of settings are means over other settings: do not compare them."


class Setting(NamedTuple):
    """What is compared within."""

    task: str
    targets: str
    rank: int
    steps: int
    dtype: str = "float32"

    def __str__(self) -> str:
        return self._name(f", r = {self.rank}")

    @property
    def without_rank(self) -> str:
        """What it has in common with settings of other ranks."""
        return self._name("")

    def _name(self, rank: str) -> str:
        precision = "" if self.dtype == "float32" else f", {self.dtype}"
        return f"{self.task}, {self.targets}{rank}, {self.steps} steps{precision}"


class Gain(NamedTuple):
    """One method in one setting at one seed, against uniform LoRA.

    Attributes:
        seed: The seed.
        gain: Of the metric; more is better.
        percent: The same in percent of uniform LoRA's metric.
        loss_gain: Of the test loss; more is better.
        params_ratio: Adapter parameters over those of uniform LoRA.
        parameters: Adapter parameters.
    """

    seed: int
    gain: float
    percent: float
    loss_gain: float
    params_ratio: float
    parameters: float


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All results.

    Args:
        folder: What `quality.py` wrote.

    Returns:
        One dictionary for each run.

    Raises:
        FileNotFoundError: If there are none.
    """
    results = [json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))]
    if not results:
        raise FileNotFoundError(f"There are no results in {folder}: run benchmarks/quality.py first.")
    return results


def setting_of(result: Mapping[str, Any]) -> Setting:
    """The setting of a run; runs that name no precision are in float32."""
    run = result["run"]
    return Setting(run["task"], run["targets"], run["rank"], run["steps"], run.get("dtype", "float32"))


def score(result: Mapping[str, Any], split: str, metric: str) -> float:
    """A metric of a run, where more is better: accuracy in points, or the loss with its sign turned."""
    value: float = result[split][metric]
    return 100 * value if metric == "accuracy" else -value


def best_rate(losses: Mapping[float, float]) -> float:
    """The learning rate with the lowest loss; one that diverged, to no number, is never it.

    Args:
        losses: Learning rate to loss on the development split.

    Returns:
        One of the rates, the smallest of equal ones.
    """
    return min(sorted(losses), key=lambda rate: math.inf if math.isnan(losses[rate]) else losses[rate])


class Sweep(NamedTuple):
    """All learning rates of a method in a setting.

    Attributes:
        runs: Learning rate to seed to run.
        first_seed: The one that was run with the most learning rates; of several the smallest.
        best: The learning rate with the lowest loss on the development split with that seed.
    """

    runs: dict[float, dict[int, Mapping[str, Any]]]
    first_seed: int
    best: float

    @property
    def at_an_end(self) -> bool:
        """Whether the best learning rate is the smallest or the largest that was run, so that it is not tuned."""
        return self.best in (min(self.test_losses), max(self.test_losses))

    @property
    def test_losses(self) -> dict[float, float]:
        """Learning rate to test loss with the first seed."""
        return {
            rate: by_seed[self.first_seed]["test"]["loss"]
            for rate, by_seed in sorted(self.runs.items())
            if self.first_seed in by_seed
        }

    def rise(self, factor: float) -> float | None:
        """Test loss at so many times the best learning rate minus that at the best one; `None` if it was not run."""
        losses = self.test_losses
        rate = factor * self.best
        return losses[rate] - losses[self.best] if rate in losses else None


def sweeps_of(results: Iterable[Mapping[str, Any]]) -> dict[str, Sweep]:
    """The learning rates of every method.

    Args:
        results: Runs of one setting.

    Returns:
        Method to sweep.
    """
    found: dict[str, dict[float, dict[int, Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for result in results:
        run = result["run"]
        found[run["method"]][run["learning_rate"]][run["seed"]] = result
    return {method: _sweep(dict(runs)) for method, runs in found.items()}


def _sweep(runs: dict[float, dict[int, Mapping[str, Any]]]) -> Sweep:
    seeds = Counter(seed for by_seed in runs.values() for seed in by_seed)
    first = min(seeds, key=lambda seed: (-seeds[seed], seed))
    losses = {rate: by_seed[first]["development"][TUNED_BY] for rate, by_seed in runs.items() if first in by_seed}
    return Sweep(runs, first, best_rate(losses))


def chosen_runs(results: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, Mapping[str, Any]]]:
    """The runs of every method at its learning rate.

    Args:
        results: Runs of one setting.

    Returns:
        Method to seed to run.
    """
    return {method: sweep.runs[sweep.best] for method, sweep in sweeps_of(results).items()}


def gains_of(results: Sequence[Mapping[str, Any]], reference: str = REFERENCE) -> dict[Setting, dict[str, list[Gain]]]:
    """Every method against one of them.

    Args:
        results: All runs.
        reference: Name of that method.

    Returns:
        Setting, if the reference was run in it, to method to one gain for each seed that both have.
    """
    gains = {}
    for setting, runs in by_setting(results).items():
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


def seeds_needed(gains: Mapping[Setting, Mapping[str, Sequence[Gain]]], reference: str = REFERENCE) -> int:
    """From how many seeds on a method is reported: `SEEDS`, or as many as the reference has anywhere.

    Args:
        gains: As `gains_of` returns them.
        reference: Name of the method that is compared with.

    Returns:
        The number.
    """
    return min(SEEDS, max((len(methods[reference]) for methods in gains.values()), default=SEEDS))


def _gain(seed: int, result: Mapping[str, Any], reference: Mapping[str, Any], metric: str) -> Gain:
    before = score(reference, "test", metric)
    gain = score(result, "test", metric) - before
    return Gain(
        seed,
        gain,
        100 * gain / abs(before),
        score(result, "test", "loss") - score(reference, "test", "loss"),
        result["adapter_parameters"] / reference["adapter_parameters"],
        result["adapter_parameters"],
    )


def over_settings(groups: Sequence[Sequence[Gain]]) -> list[Gain]:
    """The mean at every seed over settings that share it.

    Args:
        groups: Gains by seed in each setting.

    Returns:
        One gain for each seed.
    """
    by_seed: dict[int, list[Gain]] = defaultdict(list)
    for gain in itertools.chain.from_iterable(groups):
        by_seed[gain.seed].append(gain)
    return [Gain(seed, *np.mean([gain[1:] for gain in gains], axis=0).tolist()) for seed, gains in by_seed.items()]


def summary(settings: Mapping[Setting, Sequence[Gain]], unit: str) -> dict[str, Any]:
    """The numbers of one method over some settings.

    Args:
        settings: Setting to gains by seed.
        unit: `"gain"`, or `"percent"` to compare tasks.

    Returns:
        Mean gain and interval, the same of the loss, mean ratio of parameters, number of runs, settings and tasks.
    """
    by_task: dict[str, list[Sequence[Gain]]] = defaultdict(list)
    for setting, gains in settings.items():
        by_task[setting.task].append(gains)
    groups = [over_settings(of_task) for of_task in by_task.values()]
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


def report(results: Sequence[Mapping[str, Any]], reference: str = REFERENCE) -> dict[str, Any]:
    """Everything, as JSON types.

    Args:
        results: All runs.
        reference: Name of the method that all are compared with.

    Returns:
        `overall`: method to summary over the settings in which it has enough seeds. `tasks`: task to the same of its
        settings. `settings`: setting to method to summary, with its adapter parameters. `few_seeds`: setting to method
        with fewer seeds to `mean_loss_gain` and `runs`. `not_tuned`: setting to methods of which the best learning
        rate is at an end of those that were run.
    """
    gains = gains_of(results, reference)
    needed = seeds_needed(gains, reference)
    overall: dict[str, dict[Setting, list[Gain]]] = defaultdict(dict)
    tasks: dict[str, dict[str, dict[Setting, list[Gain]]]] = defaultdict(lambda: defaultdict(dict))
    settings: dict[str, dict[str, Any]] = {}
    few: dict[str, dict[str, Any]] = {}
    for setting, methods in gains.items():
        enough = {method: of_seeds for method, of_seeds in methods.items() if len(of_seeds) >= needed}
        for method, of_seeds in enough.items():
            overall[method][setting] = tasks[setting.task][method][setting] = of_seeds
        settings[str(setting)] = {
            method: summary({setting: of_seeds}, "gain") | {"parameters": mean(gain.parameters for gain in of_seeds)}
            for method, of_seeds in enough.items()
        }
        few[str(setting)] = {
            method: {"mean_loss_gain": mean(gain.loss_gain for gain in of_seeds), "runs": len(of_seeds)}
            for method, of_seeds in methods.items()
            if of_seeds and method not in enough
        }
    return {
        "overall": {method: summary(of_method, "percent") for method, of_method in overall.items()},
        "tasks": {
            task: {method: summary(of_method, "gain") for method, of_method in methods.items()}
            for task, methods in tasks.items()
        },
        "settings": settings,
        "few_seeds": few,
        "not_tuned": {
            str(setting): sorted(method for method, sweep in sweeps_of(runs).items() if sweep.at_an_end)
            for setting, runs in by_setting(results).items()
            if setting in gains
        },
    }


def first_reached(points: Sequence[tuple[float, float]], loss: float) -> float | None:
    """Where a curve first is at a loss or below it, by linear interpolation.

    Args:
        points: Places, in order, and losses.
        loss: The loss.

    Returns:
        The place; the first one if the curve begins there, and `None` if it never is.
    """
    if points[0][1] <= loss:
        return float(points[0][0])
    for (place, before), (next_place, after) in itertools.pairwise(points):
        if after <= loss:
            return place + (next_place - place) * (before - loss) / (before - after)
    return None


class Speed(NamedTuple):
    """How soon a method is where uniform LoRA ends.

    Attributes:
        end: Last step at which every run of the setting was measured.
        steps: Until the loss that uniform LoRA has there, mean over seeds; those that never have it count as `end`.
        reached: Seeds that have it.
        seeds: All.
        before: Time until training begins in training steps of that run; `None` of runs on a GPU, which several runs
            may have shared.
    """

    end: int
    steps: float
    reached: int
    seeds: int
    before: float | None


def speeds_of(results: Sequence[Mapping[str, Any]]) -> dict[str, Speed]:
    """How soon every method is where uniform LoRA ends, in one setting.

    Args:
        results: Runs of one setting.

    Returns:
        Method to speed.
    """
    chosen = chosen_runs(results)
    end = min(run["curve"][-1][0] for by_seed in chosen.values() for run in by_seed.values())
    speeds = {}
    for method, by_seed in chosen.items():
        seeds = sorted(by_seed.keys() & chosen[REFERENCE].keys())
        goals = [dict(chosen[REFERENCE][seed]["curve"])[end] for seed in seeds]
        steps = [first_reached(by_seed[seed]["curve"], goal) for seed, goal in zip(seeds, goals, strict=True)]
        # What is reached behind the last common step is not known of all.
        reached = [step for step in steps if step is not None and step <= end]
        if seeds:
            total = sum(reached) + end * (len(seeds) - len(reached))
            speeds[method] = Speed(end, total / len(seeds), len(reached), len(seeds), _before(by_seed.values()))
    return speeds


def _before(runs: Iterable[Mapping[str, Any]]) -> float | None:
    listed = list(runs)
    if any(run.get("environment", {}).get("gpu") for run in listed):
        return None
    return mean(run["calibration_seconds"] * run["run"]["steps"] / run["training_seconds"] for run in listed)


class Size(NamedTuple):
    """One method at one rank.

    Attributes:
        parameters: Of the adapter, mean over seeds.
        losses: Test loss of every seed, in their order.
        accuracy: Mean test accuracy.
    """

    parameters: float
    losses: tuple[float, ...]
    accuracy: float

    @property
    def loss(self) -> float:
        """Mean test loss."""
        return mean(self.losses)

    @property
    def error(self) -> float:
        """Its standard error over seeds."""
        return stdev(self.losses) / math.sqrt(len(self.losses)) if len(self.losses) > 1 else 0.0


def sizes_of(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[int, Size]]]:
    """Quality against parameters, wherever uniform LoRA has three ranks.

    Args:
        results: All runs.

    Returns:
        Setting without rank to method to rank to size, of those with enough seeds at two ranks or more.
    """
    needed = seeds_needed(gains_of(results))
    found: dict[str, dict[str, dict[int, Size]]] = defaultdict(lambda: defaultdict(dict))
    for setting, runs in by_setting(results).items():
        for method, by_seed in chosen_runs(runs).items():
            if len(by_seed) >= needed:
                found[setting.without_rank][method][setting.rank] = _size([by_seed[seed] for seed in sorted(by_seed)])
    return {
        name: {method: sizes for method, sizes in methods.items() if len(sizes) > 1}
        for name, methods in found.items()
        if len(methods.get(REFERENCE, ())) >= _RANKS_OF_A_CURVE
    }


def _size(runs: Sequence[Mapping[str, Any]]) -> Size:
    parameters = mean(run["adapter_parameters"] for run in runs)
    losses = tuple(run["test"]["loss"] for run in runs)
    return Size(parameters, losses, mean(run["test"]["accuracy"] for run in runs))


def parameters_to_reach(points: Iterable[tuple[float, float]], loss: float) -> float | None:
    """The adapter parameters with which a method has a loss, interpolated in their logarithm.

    Args:
        points: Parameters and losses of one method.
        loss: The loss.

    Returns:
        The parameters; those of the smallest adapter if that has it, and `None` if none has.
    """
    reached = first_reached(sorted((math.log(parameters), of_method) for parameters, of_method in points), loss)
    return None if reached is None else math.exp(reached)


def share_of_parameters(sizes: Sequence[Size], reference: Size) -> tuple[float, float]:
    """95 % interval of `parameters_to_reach`, over the parameters of the reference: seeds are drawn for all together.

    Args:
        sizes: Of one method, with the same seeds.
        reference: Uniform LoRA, whose loss is to be reached.

    Returns:
        Lower and upper end; infinite where the loss is not reached.
    """

    def share(places: Any) -> float:
        points = [(size.parameters, float(np.take(size.losses, places).mean())) for size in sizes]
        reached = parameters_to_reach(points, float(np.take(reference.losses, places).mean()))
        return math.inf if reached is None else reached / reference.parameters

    return interval_of_seeds(min(len(size.losses) for size in (*sizes, reference)), share)


def by_setting(results: Sequence[Mapping[str, Any]]) -> dict[Setting, list[Mapping[str, Any]]]:
    """The runs of every setting that has runs of uniform LoRA."""
    found: dict[Setting, list[Mapping[str, Any]]] = defaultdict(list)
    for result in results:
        found[setting_of(result)].append(result)
    return {
        setting: runs
        for setting, runs in sorted(found.items())
        if any(run["run"]["method"] == REFERENCE for run in runs)
    }


def write_docs(results: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write `evidence_tables.md`, a plot of the gains of every setting, and one of quality against parameters.

    Args:
        results: All runs.
        folder: Where to.
    """
    content, sizes = report(results), sizes_of(results)
    parts = [
        "# Tables",
        "Written by `python benchmarks/report.py --docs docs`; [evidence.md](evidence.md) says what they mean.",
        as_markdown(content),
        *(_size_table(name, methods) for name, methods in sizes.items()),
    ]
    for setting, runs in by_setting(results).items():
        parts += [_speed_table(setting, speeds_of(runs)), _rate_table(setting, sweeps_of(runs))]
        parts += [table for table in [_answer_table(setting, runs)] if table]
    (folder / "evidence_tables.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    plot_gains(content["settings"], folder / "evidence_gains.png")
    if sizes:
        plot_sizes(sizes, folder / "evidence_parameters.png")


def _size_table(name: str, methods: Mapping[str, Mapping[int, Size]]) -> str:
    ranks = sorted({rank for sizes in methods.values() for rank in sizes})
    reference = methods[REFERENCE].get(REFERENCE_RANK)
    show_accuracy = METRICS[name.split(",")[0]] == "accuracy"
    goal = f"parameters for uniform LoRA's loss at r = {REFERENCE_RANK}"
    header = ["method", *(f"r = {rank}" for rank in ranks), goal, "share of uniform LoRA's"]
    lines = [
        f"### Quality against parameters: {name}",
        "",
        f"Mean test loss{' (accuracy)' if show_accuracy else ''}. Parameters are interpolated between ranks.",
        "",
        "| " + " | ".join(header) + " |",
        "| --- |" + " ---: |" * (len(header) - 1),
    ]
    for method, sizes in sorted(methods.items(), key=lambda item: min(size.loss for size in item[1].values())):
        cells = [_size_cell(sizes.get(rank), show_accuracy) for rank in ranks]
        cells += _goal_cells(list(sizes.values()), reference)
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _size_cell(size: Size | None, show_accuracy: bool) -> str:
    if size is None:
        return "–"
    return f"{size.loss:.3f} ({100 * size.accuracy:.1f} %)" if show_accuracy else f"{size.loss:.3f}"


def _goal_cells(sizes: Sequence[Size], reference: Size | None) -> list[str]:
    if reference is None:
        return ["–", "–"]
    reached = parameters_to_reach([(size.parameters, size.loss) for size in sizes], reference.loss)
    if reached is None:
        return ["–", "–"]
    smallest = min(sizes, key=lambda size: size.parameters)
    sign = "≤ " if smallest.loss <= reference.loss else ""
    if reference in sizes:
        return [f"{reached:,.0f}", "100%"]
    low, high = share_of_parameters(sizes, reference)
    least = "≤ " if low <= smallest.parameters / reference.parameters else ""
    most = "never" if math.isinf(high) else f"{high:.0%}"
    return [f"{sign}{reached:,.0f}", f"{sign}{reached / reference.parameters:.0%} [{least}{low:.0%}, {most}]"]


def _answer_table(setting: Setting, results: Sequence[Mapping[str, Any]]) -> str | None:
    """The share of questions that were answered exactly, if any were asked."""
    lines = [
        f"### Exact match: {setting}",
        "",
        "| method | questions answered exactly | questions | seeds |",
        "| --- | ---: | ---: | ---: |",
    ]
    rows = []
    for method, by_seed in chosen_runs(results).items():
        answered = [run["test"] for run in by_seed.values() if "exact_match" in run["test"]]
        if answered:
            share = mean(test["exact_match"] for test in answered)
            questions = sum(test["exact_match_examples"] for test in answered)
            rows.append((-share, f"| {method} | {share:.1%} | {questions} | {len(answered)} |"))
    return "\n".join([*lines, *(row for _, row in sorted(rows))]) if rows else None


def _speed_table(setting: Setting, speeds: Mapping[str, Speed]) -> str:
    end = next(iter(speeds.values())).end
    lines = [
        f"### Speed: {setting}",
        "",
        f"| method | steps to uniform LoRA's loss at step {end} | seeds that get there | before training, in steps |",
        "| --- | ---: | ---: | ---: |",
    ]
    for method, speed in sorted(speeds.items(), key=lambda item: (item[1].steps, -item[1].reached)):
        least = "" if speed.reached == speed.seeds else "≥ "
        steps = f"{least}{speed.steps:.0f}" if speed.reached else "–"
        before = "–" if speed.before is None else f"{speed.before:.1f}"
        lines.append(f"| {method} | {steps} | {speed.reached} of {speed.seeds} | {before} |")
    return "\n".join(lines)


def _rate_table(setting: Setting, sweeps: Mapping[str, Sweep]) -> str:
    rates = sorted({rate for sweep in sweeps.values() for rate in sweep.test_losses})
    header = ["method", *(f"{rate:g}" for rate in rates), "at half the best", "at twice the best"]
    lines = [
        f"### Test loss over the learning rate: {setting}",
        "",
        "With the seed that the learning rate is chosen with; the last two columns are loss minus that at the best.",
        "",
        "| " + " | ".join(header) + " |",
        "| --- |" + " ---: |" * (len(header) - 1),
    ]
    for method, sweep in sorted(sweeps.items()):
        losses = sweep.test_losses
        cells = [f"{losses[rate]:.3f}" if rate in losses else "–" for rate in rates]
        rises = [sweep.rise(0.5), sweep.rise(2)]
        cells += ["–" if rise is None else f"{rise:+.3f}" for rise in rises]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot_gains(settings: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> None:
    """Draw the gain in test loss of every method with its interval, one panel for each setting.

    Args:
        settings: As `report` returns them.
        path: A PNG file.
    """
    drawn = {setting: methods for setting, methods in settings.items() if methods}
    columns = min(2, len(drawn))
    sizes = [len(methods) for methods in drawn.values()]
    heights = [max(sizes[first : first + columns]) for first in range(0, len(sizes), columns)]
    plt = _pyplot()
    figure, axes = plt.subplots(
        len(heights),
        columns,
        figsize=(6.2 * columns, sum(0.2 * size + 0.8 for size in heights)),
        squeeze=False,
        sharex=True,
        height_ratios=[size + 1 for size in heights],
        layout="constrained",
    )
    for place, (setting, methods) in enumerate(drawn.items()):
        _draw_gains(axes.flat[place], setting, methods, heights[place // columns])
    for axis in axes.flat[len(drawn) :]:
        axis.set_axis_off()
    figure.supxlabel("gain in test loss over uniform LoRA, nats (95 % interval over seeds)", fontsize=9)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _draw_gains(axis: Any, setting: str, methods: Mapping[str, Mapping[str, Any]], lines: int) -> None:
    ordered = sorted(methods.items(), key=lambda item: item[1]["mean_loss_gain"])
    means = [numbers["mean_loss_gain"] for _, numbers in ordered]
    ends = np.array([numbers["loss_ci95"] for _, numbers in ordered]).T
    colours = ["tab:blue" if name.startswith("fim") else "tab:gray" for name, _ in ordered]
    places = range(len(ordered))
    axis.errorbar(means, places, xerr=np.abs(ends - np.array(means)), fmt="none", ecolor=colours)
    axis.scatter(means, places, color=colours, s=14, zorder=3)
    axis.set_yticks(places, [name for name, _ in ordered], fontsize=8)
    axis.set_ylim(len(ordered) - lines - 0.5, len(ordered) - 0.5)
    axis.tick_params(axis="x", labelbottom=True, labelsize=8)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_title(setting, fontsize=9)


def _looks(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Lines that are told apart without colours, too; uniform LoRA's is thick and black."""
    others = sorted(method for method in methods if method != REFERENCE)
    looks: dict[str, dict[str, Any]] = {
        method: {
            "color": f"C{index % 10}",
            "marker": "s^Dvx"[index % 5],
            "linestyle": "-" if index < 10 else "--",
            "linewidth": 1.2,
        }
        for index, method in enumerate(others)
    }
    return looks | {REFERENCE: {"color": "black", "marker": "o", "linestyle": "-", "linewidth": 2.2}}


def plot_sizes(sizes: Mapping[str, Mapping[str, Mapping[int, Size]]], path: Path) -> None:
    """Draw the test loss over the adapter parameters, one panel for each setting.

    Args:
        sizes: As `sizes_of` returns them.
        path: A PNG file.
    """
    looks = _looks({method for methods in sizes.values() for method in methods})
    plt = _pyplot()
    figure, axes = plt.subplots(len(sizes), 1, figsize=(9, 4 * len(sizes)), squeeze=False, layout="constrained")
    for axis, (setting, methods) in zip(axes[:, 0], sizes.items(), strict=True):
        for method, by_rank in sorted(methods.items()):
            points = sorted(by_rank.values())
            axis.errorbar(
                [size.parameters for size in points],
                [size.loss for size in points],
                yerr=[size.error for size in points],
                label=method,
                markersize=4,
                capsize=2,
                **looks[method],
            )
        axis.set_xscale("log")
        axis.minorticks_off()
        ranks = methods[REFERENCE]
        places = [size.parameters for size in ranks.values()]
        axis.set_xticks(places, [f"{size.parameters:,.0f}\nr = {rank}" for rank, size in ranks.items()], fontsize=8)
        axis.set_title(setting, fontsize=10)
        axis.set_ylabel("test loss, nats (± standard error)", fontsize=9)
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    axes[-1, 0].set_xlabel("adapter parameters; marked are those of uniform LoRA", fontsize=9)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def as_markdown(content: Mapping[str, Any]) -> str:
    """The tables.

    Args:
        content: What `report` returned.

    Returns:
        Markdown.
    """
    parts = [_table("All tasks", "%", content["overall"], "tasks", "settings"), _OVERALL]
    for task, methods in content["tasks"].items():
        parts += [_table(f"All settings of {task}", UNITS[METRICS[task]], methods, "settings"), _OF_ONE_TASK]
    for setting, methods in content["settings"].items():
        unit = UNITS[METRICS[setting.split(",")[0]]]
        parts += [_table(setting, unit, methods)] if methods else [f"### {setting}"]
        parts += _lines_of_few_seeds(content["few_seeds"][setting])
        if content["not_tuned"][setting]:
            parts += [f"{_NOT_TUNED}: {', '.join(content['not_tuned'][setting])}."]
    return "\n\n".join(parts)


def _table(title: str, unit: str, methods: Mapping[str, Mapping[str, Any]], *more_columns: str) -> str:
    header = [
        "method",
        f"gain, {unit} [95 %]",
        "gain in loss, nats [95 %]",
        "adapter parameters",
        "runs",
        *more_columns,
    ]
    lines = [f"### {title}", "", "| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    for method, numbers in sorted(
        methods.items(), key=lambda item: (-item[1]["tasks"], -item[1]["settings"], -item[1]["mean_loss_gain"])
    ):
        cells = [
            _with_interval(numbers["mean_gain"], numbers["ci95"], 4 if unit == UNITS["loss"] else 2),
            _with_interval(numbers["mean_loss_gain"], numbers["loss_ci95"], 4),
            f"{numbers['params_ratio']:.3f}" + (f" ({numbers['parameters']:,.0f})" if "parameters" in numbers else ""),
            *(str(numbers[column]) for column in ("runs", *more_columns)),
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _with_interval(value: float, ends: Sequence[float], digits: int) -> str:
    return f"{value:+.{digits}f} [{ends[0]:+.{digits}f}, {ends[1]:+.{digits}f}]"


def _lines_of_few_seeds(methods: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for each number of seeds: the gains in test loss, which have no interval."""
    lines = []
    for runs in sorted({numbers["runs"] for numbers in methods.values()}, reverse=True):
        gains = sorted(
            ((numbers["mean_loss_gain"], method) for method, numbers in methods.items() if numbers["runs"] == runs),
            reverse=True,
        )
        seeds = "Tuned on one seed only" if runs == 1 else f"On {runs} seeds only"
        lines.append(f"{seeds}: " + ", ".join(f"{method} ({gain:+.3f})" for gain, method in gains) + ".")
    return lines


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "quality")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--against",
        default=REFERENCE,
        metavar="METHOD",
        help="to compare with, instead of uniform LoRA, where it was run; not for --docs",
    )
    parser.add_argument("--docs", type=Path, help="write tables and plots to this folder")
    options = parser.parse_args()
    results = read_results(options.results)
    if options.docs:
        write_docs(results, options.docs)
        return
    methods = sorted({result["run"]["method"] for result in results})
    if options.against not in methods:
        parser.error(f"--against: {options.results} has no run of {options.against!r}, only of {', '.join(methods)}")
    content = report(results, options.against)
    print(json.dumps(content, indent=2) if options.json else as_markdown(content))


if __name__ == "__main__":
    main()
