"""What the runs of `quality.py` say: gains over uniform LoRA, paired by seed, with bootstrap confidence intervals.

    python benchmarks/report.py           # tables, as Markdown
    python benchmarks/report.py --json    # the same numbers, for programs
    python benchmarks/report.py --docs docs    # tables and plots of docs/evidence.md

A setting is a task, targets, a rank and a number of steps. In each, the learning rate of a method is the one with the
lowest mean loss over seeds on the development split; what is reported comes from the test split, which nothing was
chosen on. A gain is a method's metric minus uniform LoRA's at the same seed, with the sign turned where less is
better: in accuracy points for classes, in nats of loss for text. Over all settings, which have no unit in common,
it is in percent of uniform LoRA's metric.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np

REFERENCE = "uniform"
METRICS = {"banking77": "accuracy", "sst2": "accuracy", "gsm8k": "loss"}
"""Task to main metric."""

TUNED_BY = "loss"
"""What the learning rate is chosen by: on a few hundred examples the loss tells learning rates apart that the
accuracy does not."""

RESAMPLES = 10_000


class Setting(NamedTuple):
    """What is compared within."""

    task: str
    targets: str
    rank: int
    steps: int

    def __str__(self) -> str:
        return f"{self.task}, {self.targets}, r = {self.rank}, {self.steps} steps"


class Gain(NamedTuple):
    """One method in one setting at one seed, against uniform LoRA.

    Attributes:
        gain: Of the metric; more is better.
        percent: The same in percent of uniform LoRA's metric.
        loss_gain: Of the test loss; more is better.
        params_ratio: Adapter parameters over those of uniform LoRA.
    """

    gain: float
    percent: float
    loss_gain: float
    params_ratio: float


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
    """The setting of a run."""
    run = result["run"]
    return Setting(run["task"], run["targets"], run["rank"], run["steps"])


def score(result: Mapping[str, Any], split: str, metric: str) -> float:
    """A metric of a run, where more is better: accuracy in points, or the loss with its sign turned."""
    value: float = result[split][metric]
    return 100 * value if metric == "accuracy" else -value


def chosen_runs(results: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, Mapping[str, Any]]]:
    """The runs of every method at its learning rate.

    Args:
        results: Runs of one setting.

    Returns:
        Method to seed to run.
    """
    by_rate: dict[str, dict[float, dict[int, Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for result in results:
        run = result["run"]
        by_rate[run["method"]][run["learning_rate"]][run["seed"]] = result
    return {method: _best_rate(rates) for method, rates in by_rate.items()}


def _best_rate(rates: Mapping[float, dict[int, Mapping[str, Any]]]) -> dict[int, Mapping[str, Any]]:
    """The learning rate is chosen over the seeds that all rates have, and among the rates that have the most seeds."""
    most = max(len(runs) for runs in rates.values())
    full = {rate: runs for rate, runs in rates.items() if len(runs) == most}
    shared = set.intersection(*(set(runs) for runs in full.values()))

    def development(rate: float) -> float:
        return mean(score(full[rate][seed], "development", TUNED_BY) for seed in shared or full[rate])

    return full[max(full, key=development)]


def gains_of(results: Sequence[Mapping[str, Any]]) -> dict[Setting, dict[str, list[Gain]]]:
    """Every method against uniform LoRA.

    Args:
        results: All runs.

    Returns:
        Setting to method to one gain for each seed that both have.
    """
    by_setting: dict[Setting, list[Mapping[str, Any]]] = defaultdict(list)
    for result in results:
        by_setting[setting_of(result)].append(result)
    gains = {}
    for setting, runs in sorted(by_setting.items()):
        metric = METRICS[setting.task]
        chosen = chosen_runs(runs)
        if REFERENCE in chosen:
            gains[setting] = {
                method: [
                    _gain(by_seed[seed], chosen[REFERENCE][seed], metric)
                    for seed in sorted(by_seed.keys() & chosen[REFERENCE].keys())
                ]
                for method, by_seed in chosen.items()
            }
    return gains


def _gain(result: Mapping[str, Any], reference: Mapping[str, Any], metric: str) -> Gain:
    before = score(reference, "test", metric)
    gain = score(result, "test", metric) - before
    return Gain(
        gain,
        100 * gain / abs(before),
        score(result, "test", "loss") - score(reference, "test", "loss"),
        result["adapter_parameters"] / reference["adapter_parameters"],
    )


def interval(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over groups of the mean over seeds; seeds are drawn within each group.

    Args:
        groups: Gains of the seeds of each setting.

    Returns:
        Lower and upper end. With a single seed there is no spread to draw from, and it says so with equal ends.
    """
    draw = np.random.default_rng(0)
    means = [
        np.mean(draw.choice(np.asarray(group), (RESAMPLES, len(group))), axis=1) for group in groups if len(group) > 0
    ]
    low, high = np.quantile(np.mean(means, axis=0), [0.025, 0.975])
    return float(low), float(high)


def summary(groups: Sequence[Sequence[Gain]], unit: str) -> dict[str, Any]:
    """The numbers of one method over some settings.

    Args:
        groups: Its gains by seed in each setting.
        unit: `"gain"`, or `"percent"` to compare settings.

    Returns:
        Mean gain, interval, mean ratio of parameters, number of runs; and the same of the loss.
    """
    groups = [group for group in groups if group]
    return {
        "mean_gain": mean(mean(getattr(gain, unit) for gain in group) for group in groups),
        "ci95": list(interval([[getattr(gain, unit) for gain in group] for group in groups])),
        "mean_loss_gain": mean(mean(gain.loss_gain for gain in group) for group in groups),
        "loss_ci95": list(interval([[gain.loss_gain for gain in group] for group in groups])),
        "params_ratio": mean(gain.params_ratio for group in groups for gain in group),
        "runs": sum(len(group) for group in groups),
    }


def report(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Everything, as JSON types.

    Args:
        results: All runs.

    Returns:
        `overall`: method to summary over all settings. `tasks`: setting to method to summary.
    """
    gains = gains_of(results)
    by_method: dict[str, list[list[Gain]]] = defaultdict(list)
    for methods in gains.values():
        for method, of_seeds in methods.items():
            if of_seeds:
                by_method[method].append(of_seeds)
    return {
        "overall": {method: summary(groups, "percent") for method, groups in by_method.items()},
        "tasks": {
            str(setting): {method: summary([of_seeds], "gain") for method, of_seeds in methods.items() if of_seeds}
            for setting, methods in gains.items()
        },
    }


def steps_to_reference(curve: Sequence[tuple[float, float]], reference: Sequence[tuple[float, float]]) -> float | None:
    """Steps until a method has the last measured loss of uniform LoRA, by linear interpolation.

    Args:
        curve: Steps and losses of the method.
        reference: The same of uniform LoRA.

    Returns:
        Steps; `None` if it never has.
    """
    target = reference[-1][1]
    if curve[0][1] <= target:
        return float(curve[0][0])
    for (step, loss), (next_step, next_loss) in itertools.pairwise(curve):
        if next_loss <= target:
            return step + (next_step - step) * (loss - target) / (loss - next_loss)
    return None


def speeds_of(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """How soon every method is where uniform LoRA is at its last measurement, in one setting.

    Args:
        results: Runs of one setting.

    Returns:
        Method to `steps`, the mean over the seeds that get there; `reached`, the share of seeds that do; and
        `calibration_steps`, the time until training begins in training steps of that run.
    """
    chosen = chosen_runs(results)
    speeds = {}
    for method, by_seed in chosen.items():
        seeds = sorted(by_seed.keys() & chosen[REFERENCE].keys())
        steps = [steps_to_reference(by_seed[seed]["curve"], chosen[REFERENCE][seed]["curve"]) for seed in seeds]
        reached = [step for step in steps if step is not None]
        if seeds:
            speeds[method] = {
                "steps": mean(reached) if reached else float("nan"),
                "reached": len(reached) / len(steps),
                "calibration_steps": mean(
                    run["calibration_seconds"] * run["run"]["steps"] / run["training_seconds"]
                    for run in by_seed.values()
                ),
            }
    return speeds


def by_rate(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[float, float]]:
    """The test loss over the learning rates in one setting.

    Args:
        results: Runs of one setting.

    Returns:
        Method to learning rate to mean loss over the seeds that were run with all rates of the method.
    """
    found: dict[str, dict[float, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for result in results:
        run = result["run"]
        found[run["method"]][run["learning_rate"]][run["seed"]] = result["test"]["loss"]
    table = {}
    for method, rates in found.items():
        seeds = set.intersection(*(set(losses) for losses in rates.values()))
        table[method] = {rate: mean(losses[seed] for seed in seeds) for rate, losses in sorted(rates.items()) if seeds}
    return table


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
    """Write `evidence_tables.md`, and a plot of the gains of every setting.

    Args:
        results: All runs.
        folder: Where to.
    """
    parts = [
        "# Tables",
        "Written by `python benchmarks/report.py --docs docs`; [evidence.md](evidence.md) says what they mean.",
        as_markdown(report(results)),
    ]
    for setting, runs in by_setting(results).items():
        parts += [_speed_table(setting, speeds_of(runs)), _rate_table(setting, by_rate(runs))]
    (folder / "evidence_tables.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    plot_gains(report(results)["tasks"], folder / "evidence_gains.png")


def _speed_table(setting: Setting, speeds: Mapping[str, Mapping[str, float]]) -> str:
    lines = [
        f"### Speed: {setting}",
        "",
        "| method | steps to uniform LoRA's last measured loss | seeds that get there | before training, in steps |",
        "| --- | ---: | ---: | ---: |",
    ]
    for method, row in sorted(speeds.items(), key=lambda item: (-item[1]["reached"], item[1]["steps"])):
        steps = "–" if not row["reached"] else f"{row['steps']:.0f}"
        lines.append(f"| {method} | {steps} | {row['reached']:.0%} | {row['calibration_steps']:.1f} |")
    return "\n".join(lines)


def _rate_table(setting: Setting, table: Mapping[str, Mapping[float, float]]) -> str:
    rates = sorted({rate for row in table.values() for rate in row})
    lines = [
        f"### Test loss over the learning rate: {setting}",
        "",
        "| method | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
        "| --- | " + " | ".join("---:" for _ in rates) + " |",
    ]
    for method, row in sorted(table.items()):
        cells = [f"{row[rate]:.3f}" if rate in row else "–" for rate in rates]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot_gains(tasks: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> None:
    """Draw the gain in test loss of every method with its interval, one panel for each setting.

    Args:
        tasks: As `report` returns them.
        path: A PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sizes = [len(methods) for methods in tasks.values()]
    height = sum(0.24 * size + 0.8 for size in sizes)
    figure, axes = plt.subplots(
        len(tasks), 1, figsize=(7, height), squeeze=False, sharex=True, height_ratios=sizes, layout="constrained"
    )
    for axis, (setting, methods) in zip(axes[:, 0], tasks.items(), strict=True):
        ordered = sorted(methods.items(), key=lambda item: item[1]["mean_loss_gain"])
        means = [numbers["mean_loss_gain"] for _, numbers in ordered]
        ends = np.array([numbers["loss_ci95"] for _, numbers in ordered]).T
        spread = np.abs(ends - np.array(means))
        colours = ["tab:blue" if name.startswith("fim") else "tab:gray" for name, _ in ordered]
        places = range(len(ordered))
        axis.errorbar(means, places, xerr=spread, fmt="none", ecolor=colours)
        axis.scatter(means, places, color=colours, s=14, zorder=3)
        axis.set_yticks(places, [name for name, _ in ordered], fontsize=8)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(setting, fontsize=9)
    axes[-1, 0].set_xlabel("gain in test loss over uniform LoRA, nats (95 % interval over seeds)")
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def as_markdown(content: Mapping[str, Any]) -> str:
    """The tables.

    Args:
        content: What `report` returned.

    Returns:
        Markdown.
    """
    parts = [_table("All settings, gain in percent", content["overall"])]
    parts += [_table(setting, methods) for setting, methods in content["tasks"].items()]
    return "\n\n".join(parts)


def _table(title: str, methods: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        f"### {title}",
        "",
        "| method | gain [95 %] | gain in loss, nats [95 %] | parameters | runs |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for method, numbers in sorted(methods.items(), key=lambda item: -item[1]["mean_loss_gain"]):
        gain = f"{numbers['mean_gain']:+.2f} [{numbers['ci95'][0]:+.2f}, {numbers['ci95'][1]:+.2f}]"
        low, high = numbers["loss_ci95"]
        loss = f"{numbers['mean_loss_gain']:+.4f} [{low:+.4f}, {high:+.4f}]"
        lines.append(f"| {method} | {gain} | {loss} | {numbers['params_ratio']:.3f} | {numbers['runs']} |")
    return "\n".join(lines)


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "quality")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--docs", type=Path, help="write tables and plots to this folder")
    options = parser.parse_args()
    results = read_results(options.results)
    if options.docs:
        write_docs(results, options.docs)
        return
    content = report(results)
    print(json.dumps(content, indent=2) if options.json else as_markdown(content))


if __name__ == "__main__":
    main()
