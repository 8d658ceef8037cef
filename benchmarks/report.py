"""Report the runs of `quality.py`: gains over uniform LoRA, paired by seed, with bootstrap confidence intervals.

    python benchmarks/report.py           # tables, as Markdown
    python benchmarks/report.py --json    # the same numbers, as JSON
    python benchmarks/report.py --docs docs    # the tables and plots of docs/evidence.md and docs/evidence_details.md

A setting is a task, its targets, a rank, a number of steps and a precision. In each setting, the learning rate of a
method is the one with the lowest loss on the development split. The first seed decides, which is the one that was run
with the most learning rates. All reported numbers come from the test split, which is not used for any choice.
`gains.py` defines the gains.

Gains are reported with an interval (`intervals.py`) if a method has five seeds in a setting, or as many as uniform
LoRA has anywhere if that is fewer. Methods with fewer seeds are listed below the table of the setting.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from gains import METRICS, REFERENCE, UNITS, Setting, gains_report, group_by_setting, read_results
from learning_rates import Sweep, chosen_runs, sweeps_by_method
from report_plots import plot_gains, plot_sizes
from speeds_and_sizes import (
    REFERENCE_RANK,
    Size,
    Speed,
    parameter_share_interval,
    parameters_to_reach,
    sizes_by_setting,
    speeds_by_method,
)

_ALL_TASKS_NOTE = (
    "Each row is the mean over tasks of the mean over the settings of a task. Do not compare rows with different "
    "numbers of tasks or settings: they are means over different tasks or settings."
)
_ONE_TASK_NOTE = (
    "Do not compare rows with different numbers of settings: they are means over different settings of the task."
)
_NOT_TUNED = "Not tuned, because the best learning rate is the smallest or the largest that was run"


def write_docs(results: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write `evidence_tables.md`, a plot of the gains in every setting, and a plot of the loss by adapter size."""
    content, sizes = gains_report(results), sizes_by_setting(results)
    parts = [
        "# Tables",
        "Written by `python benchmarks/report.py --docs docs`, and explained in [the details](evidence_details.md).",
        as_markdown(content),
        *(_size_table(name, methods) for name, methods in sizes.items()),
    ]
    for setting, runs in group_by_setting(results).items():
        parts += [_speed_table(setting, speeds_by_method(runs)), _rate_table(setting, sweeps_by_method(runs))]
        parts += [table for table in [_answer_table(setting, runs)] if table]
    (folder / "evidence_tables.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    plot_gains(content["settings"], folder / "evidence_gains.png")
    if sizes:
        plot_sizes(sizes, folder / "evidence_parameters.png")


# --- Gains -------------------------------------------------------------------------------------------------------


def as_markdown(content: Mapping[str, Any]) -> str:
    """Format the result of `gains_report` as Markdown tables."""
    parts = [_gain_table("All tasks", "%", content["overall"], "tasks", "settings"), _ALL_TASKS_NOTE]
    for task, methods in content["tasks"].items():
        parts += [_gain_table(f"All settings of {task}", UNITS[METRICS[task]], methods, "settings"), _ONE_TASK_NOTE]
    for setting, methods in content["settings"].items():
        unit = UNITS[METRICS[setting.split(",")[0]]]
        parts += [_gain_table(setting, unit, methods)] if methods else [f"### {setting}"]
        parts += _few_seeds_lines(content["few_seeds"][setting])
        if content["not_tuned"][setting]:
            parts += [f"{_NOT_TUNED}: {', '.join(content['not_tuned'][setting])}."]
    return "\n\n".join(parts)


def _gain_table(title: str, unit: str, methods: Mapping[str, Mapping[str, Any]], *more_columns: str) -> str:
    header = [
        "method",
        f"gain, {unit} [95 %]",
        "gain in loss, nats [95 %]",
        "adapter parameters",
        "runs",
        *more_columns,
    ]
    lines = [f"### {title}", "", *_header_lines(header)]
    for method, numbers in sorted(
        methods.items(), key=lambda item: (-item[1]["tasks"], -item[1]["settings"], -item[1]["mean_loss_gain"])
    ):
        cells = [
            _with_interval(numbers["mean_gain"], numbers["ci95"], 4 if unit == UNITS["loss"] else 2),
            _with_interval(numbers["mean_loss_gain"], numbers["loss_ci95"], 4),
            f"{numbers['params_ratio']:.3f}" + (f" ({numbers['parameters']:,.0f})" if "parameters" in numbers else ""),
            *(str(numbers[column]) for column in ("runs", *more_columns)),
        ]
        lines.append(_row(method, cells))
    return "\n".join(lines)


def _header_lines(header: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]


def _row(method: str, cells: Sequence[str]) -> str:
    return f"| {method} | " + " | ".join(cells) + " |"


def _with_interval(value: float, ends: Sequence[float], digits: int) -> str:
    return f"{value:+.{digits}f} [{ends[0]:+.{digits}f}, {ends[1]:+.{digits}f}]"


def _few_seeds_lines(methods: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for each number of seeds, with the gains in test loss, which have no interval."""
    lines = []
    for runs in sorted({numbers["runs"] for numbers in methods.values()}, reverse=True):
        gains = sorted(
            ((numbers["mean_loss_gain"], method) for method, numbers in methods.items() if numbers["runs"] == runs),
            reverse=True,
        )
        seeds = "Tuned on one seed only" if runs == 1 else f"On {runs} seeds only"
        lines.append(f"{seeds}: " + ", ".join(f"{method} ({gain:+.3f})" for gain, method in gains) + ".")
    return lines


# --- Sizes, speeds, learning rates and answers -------------------------------------------------------------------


def _size_table(name: str, methods: Mapping[str, Mapping[int, Size]]) -> str:
    ranks = sorted({rank for sizes in methods.values() for rank in sizes})
    reference = methods[REFERENCE].get(REFERENCE_RANK)
    show_accuracy = METRICS[name.split(",")[0]] == "accuracy"
    goal = f"parameters needed for uniform LoRA's loss at r = {REFERENCE_RANK}"
    header = ["method", *(f"r = {rank}" for rank in ranks), goal, "share of uniform LoRA's parameters"]
    lines = [
        f"### Test loss by number of parameters: {name}",
        "",
        f"Mean test loss{' (accuracy)' if show_accuracy else ''}. Parameters are interpolated between ranks.",
        "",
        *_header_lines(header),
    ]
    for method, sizes in sorted(methods.items(), key=lambda item: min(size.loss for size in item[1].values())):
        cells = [_size_cell(sizes.get(rank), show_accuracy) for rank in ranks]
        lines.append(_row(method, [*cells, *_goal_cells(list(sizes.values()), reference)]))
    return "\n".join(lines)


def _size_cell(size: Size | None, show_accuracy: bool) -> str:
    if size is None:
        return "–"
    return f"{size.loss:.3f} ({100 * size.accuracy:.1f} %)" if show_accuracy else f"{size.loss:.3f}"


def _goal_cells(sizes: Sequence[Size], reference: Size | None) -> list[str]:
    """Parameters needed for the loss of uniform LoRA, and their share of uniform LoRA's parameters."""
    if reference is None:
        return ["–", "–"]
    reached = parameters_to_reach([(size.parameters, size.loss) for size in sizes], reference.loss)
    if reached is None:
        return ["–", "–"]
    smallest = min(sizes, key=lambda size: size.parameters)
    sign = "≤ " if smallest.loss <= reference.loss else ""
    if reference in sizes:
        return [f"{reached:,.0f}", "100%"]
    low, high = parameter_share_interval(sizes, reference)
    low_sign = "≤ " if low <= smallest.parameters / reference.parameters else ""
    high_text = "never" if math.isinf(high) else f"{high:.0%}"
    return [f"{sign}{reached:,.0f}", f"{sign}{reached / reference.parameters:.0%} [{low_sign}{low:.0%}, {high_text}]"]


def _speed_table(setting: Setting, speeds: Mapping[str, Speed]) -> str:
    end = next(iter(speeds.values())).end
    header = [
        "method",
        f"steps to uniform LoRA's loss at step {end}",
        "seeds that reach it",
        "time before training, in steps",
    ]
    lines = [f"### Speed: {setting}", "", *_header_lines(header)]
    for method, speed in sorted(speeds.items(), key=lambda item: (item[1].steps, -item[1].reached)):
        sign = "" if speed.reached == speed.seeds else "≥ "
        steps = f"{sign}{speed.steps:.0f}" if speed.reached else "–"
        calibration = "–" if speed.calibration_steps is None else f"{speed.calibration_steps:.1f}"
        lines.append(_row(method, [steps, f"{speed.reached} of {speed.seeds}", calibration]))
    return "\n".join(lines)


def _rate_table(setting: Setting, sweeps: Mapping[str, Sweep]) -> str:
    rates = sorted({rate for sweep in sweeps.values() for rate in sweep.test_losses})
    lines = [
        f"### Test loss by learning rate: {setting}",
        "",
        "All losses are from the seed that selects the learning rate. The last two columns are the loss "
        "minus the loss at the best learning rate.",
        "",
        *_header_lines(["method", *(f"{rate:g}" for rate in rates), "at half the best", "at twice the best"]),
    ]
    for method, sweep in sorted(sweeps.items()):
        losses = sweep.test_losses
        cells = [f"{losses[rate]:.3f}" if rate in losses else "–" for rate in rates]
        rises = [sweep.rise(0.5), sweep.rise(2)]
        cells += ["–" if rise is None else f"{rise:+.3f}" for rise in rises]
        lines.append(_row(method, cells))
    return "\n".join(lines)


def _answer_table(setting: Setting, results: Sequence[Mapping[str, Any]]) -> str | None:
    """The share of questions with an exactly matching answer; `None` if no run answered questions."""
    header = ["method", "questions answered exactly", "questions", "seeds"]
    rows = []
    for method, by_seed in chosen_runs(results).items():
        answered = [run["test"] for run in by_seed.values() if "exact_match" in run["test"]]
        if answered:
            share = mean(test["exact_match"] for test in answered)
            questions = sum(test["exact_match_examples"] for test in answered)
            rows.append((-share, _row(method, [f"{share:.1%}", str(questions), str(len(answered))])))
    if not rows:
        return None
    return "\n".join([f"### Exact match: {setting}", "", *_header_lines(header), *(row for _, row in sorted(rows))])


def main() -> None:
    """Print the report, or write the documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "quality")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--against",
        default=REFERENCE,
        metavar="METHOD",
        help="the method to compare with, in the settings in which it was run (%(default)s); not used with --docs",
    )
    parser.add_argument("--docs", type=Path, help="write tables and plots to this folder")
    options = parser.parse_args()
    results = read_results(options.results)
    if options.docs:
        write_docs(results, options.docs)
        return
    methods = sorted({result["run"]["method"] for result in results})
    if options.against not in methods:
        parser.error(
            f"--against: {options.results} has no run of {options.against!r}; choose one of {', '.join(methods)}"
        )
    content = gains_report(results, options.against)
    print(json.dumps(content, indent=2) if options.json else as_markdown(content))


if __name__ == "__main__":
    main()
