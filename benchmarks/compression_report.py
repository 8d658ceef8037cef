"""The tables of `compression.py`: increases of the held-out loss, and their ratios to those of another criterion."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000

TOLERATED_INCREASE = 0.01
"""For each adapter, the tables have the smallest size whose loss is at most this much higher, in nats."""

TRAINED_AT_SIZE = "trained at this size"
"""What stands in the result files in the place of a criterion for adapters that were trained at the smaller size."""

Floats = NDArray[np.float64]


def summary(results: Sequence[Mapping[str, Any]], sizes: Sequence[int], ours: str, reference: str) -> dict[str, Any]:
    """Increases by task and their ratios to those of the reference.

    A ratio at a size is the mean over tasks of (sum of the increases of `ours` over the adapters of the task) / (the
    same sum of `reference`). Tasks in which the increase of the reference is not above its noise have no ratio. The
    intervals are 95 % percentile intervals over draws of the adapters of each task and of the test batches, which all
    criteria share.

    Args:
        results: The result files. Those without `ours` or `reference`, of a run that is not finished, are left out.
        sizes: The sizes, as the number of parts of which one is kept.
        ours: The criterion whose ratio is reported.
        reference: The criterion that it is compared with.

    Returns:
        `increase_over_para`: size to `mean`, `ci95` and the tasks it is over. `tasks`: task to increases with
        intervals by criterion and size, over the adapters for which the criterion was measured, with their number and
        the increase of the reference for the same ones; ratios by size; and the adapters. `above_para`: adapters and
        sizes at which the increase of `ours` is above that of the reference, with the interval of the difference over
        test batches.
    """
    results = [result for result in results if {ours, reference} <= result["criteria"].keys()]
    by_task: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for result in results:
        by_task[result["run"]["task"]].append(result)
    tasks = {task: _task_summary(found, sizes, ours, reference) for task, found in by_task.items()}
    overall = {}
    for size in map(str, sizes):
        usable = [task for task, found in tasks.items() if found["ratios"][size] is not None]
        if not usable:
            continue
        draws = np.mean([tasks[task]["ratio_draws"][size] for task in usable], axis=0)
        mean = float(np.mean([tasks[task]["ratios"][size]["mean"] for task in usable]))
        overall[size] = {"mean": mean, "ci95": _quantiles(draws), "tasks": usable}
    for found in tasks.values():
        del found["ratio_draws"]
    above = [one for result in results for size in sizes if (one := _above(result, size, ours, reference)) is not None]
    return {"increase_over_para": overall, "tasks": tasks, "above_para": above}


def _above(result: Mapping[str, Any], size: int, ours: str, reference: str) -> dict[str, Any] | None:
    """By how much the increase of `ours` is above that of the reference, or `None` if it is not."""
    mean = _increase(result, ours, str(size)) - _increase(result, reference, str(size))
    if mean <= 0:
        return None
    first, second = (np.array(result["criteria"][name]["sizes"][str(size)]["losses"]) for name in (ours, reference))
    generator = np.random.default_rng(0)
    draws = []
    for _ in range(RESAMPLES):
        chosen = generator.integers(0, len(first), len(first))
        (one, terms), (other, _) = first[chosen].sum(axis=0), second[chosen].sum(axis=0)
        draws.append((one - other) / terms)
    return dict(result["run"]) | {"size": size, "mean": mean, "ci95": _quantiles(np.array(draws))}


def _task_summary(
    results: Sequence[Mapping[str, Any]], sizes: Sequence[int], ours: str, reference: str
) -> dict[str, Any]:
    ratios: dict[str, Any] = {}
    ratio_draws: dict[str, Floats] = {}
    for size in map(str, sizes):
        draws = {criterion: _draws(results, criterion, size) for criterion in (ours, reference)}
        means = {criterion: _mean_increase(results, criterion, size) for criterion in (ours, reference)}
        ratios[size] = None
        if _quantiles(draws[reference])[0] > 0:
            ratio_draws[size] = draws[ours] / draws[reference]
            ratios[size] = {"mean": means[ours] / means[reference], "ci95": _quantiles(ratio_draws[size])}
        difference = draws[ours] - draws[reference]
        ratios[f"difference {size}"] = {"mean": means[ours] - means[reference], "ci95": _quantiles(difference)}
    return {
        "increases": _increases(results, sizes, reference),
        "ratios": ratios,
        "ratio_draws": ratio_draws,
        "adapters": [_adapter_row(result, sizes, ours, reference) for result in results],
    }


def _increases(
    results: Sequence[Mapping[str, Any]], sizes: Sequence[int], reference: str
) -> dict[str, dict[str, Any]]:
    """Criterion to size to the increase over the adapters that have the criterion, and the reference's over them."""
    names = dict.fromkeys(name for result in results for name in result["criteria"] if name != TRAINED_AT_SIZE)
    increases: dict[str, dict[str, Any]] = {}
    for name in names:
        measured = [result for result in results if name in result["criteria"]]
        increases[name] = {
            str(size): {
                "mean": _mean_increase(measured, name, str(size)),
                "ci95": _quantiles(_draws(measured, name, str(size))),
                "reference": _mean_increase(measured, reference, str(size)),
                "adapters": len(measured),
            }
            for size in sizes
        }
    return increases


def _adapter_row(result: Mapping[str, Any], sizes: Sequence[int], ours: str, reference: str) -> dict[str, Any]:
    row = dict(result["run"]) | {"loss": _loss(result["whole"])}
    for key, name in {"ours": ours, "reference": reference, "trained": TRAINED_AT_SIZE}.items():
        if name in result["criteria"]:
            row[key] = {str(size): _increase(result, name, str(size)) for size in sizes}
            row[f"{key}_within"] = _smallest_within(row[key], TOLERATED_INCREASE)
    return row


def _smallest_within(increases: Mapping[str, float], limit: float) -> str:
    """The smallest size with at most this increase, among those that have it and whose larger sizes have it."""
    found = "1"
    for size, increase in increases.items():
        if increase > limit:
            break
        found = f"1/{size}"
    return found


def _loss(losses: Sequence[Sequence[float]]) -> float:
    total, terms = np.sum(losses, axis=0)
    return float(total / terms)


def _increase(result: Mapping[str, Any], criterion: str, size: str) -> float:
    return _loss(result["criteria"][criterion]["sizes"][size]["losses"]) - _loss(result["whole"])


def _mean_increase(results: Sequence[Mapping[str, Any]], criterion: str, size: str) -> float:
    return float(np.mean([_increase(result, criterion, size) for result in results]))


def _draws(results: Sequence[Mapping[str, Any]], criterion: str, size: str) -> Floats:
    """Mean increases over drawn adapters and drawn test batches; the draws are the same for every criterion."""
    whole = np.array([result["whole"] for result in results])  # adapters × batches × (loss, terms)
    cut = np.array([result["criteria"][criterion]["sizes"][size]["losses"] for result in results])
    generator = np.random.default_rng(0)
    adapters, batches = whole.shape[:2]
    found = np.empty(RESAMPLES)
    for draw in range(RESAMPLES):
        chosen = generator.integers(0, batches, batches)
        rows = generator.integers(0, adapters, adapters)
        before, after = (losses[rows][:, chosen].sum(axis=1) for losses in (whole, cut))
        found[draw] = np.mean(after[:, 0] / after[:, 1] - before[:, 0] / before[:, 1])
    return found


def _quantiles(draws: Floats) -> list[float]:
    return [float(value) for value in np.quantile(draws, [0.025, 0.975])]


def format_report(found: Mapping[str, Any]) -> str:
    """The summary as Markdown tables."""
    lines = []
    for task, content in found["tasks"].items():
        sizes = list(next(iter(content["increases"].values())))
        lines += [f"### {task}: increase of the held-out loss, over {len(content['adapters'])} adapters", ""]
        lines += _table(["criterion", "adapters", *(f"1/{size} / PARA's" for size in sizes)])
        for criterion, by_size in content["increases"].items():
            cells = [f"{_cell(by_size[size])} / {by_size[size]['reference']:+.4f}" for size in sizes]
            lines.append(_row([criterion, str(by_size[sizes[0]]["adapters"]), *cells]))
        lines += ["", *_ratio_lines(content, sizes), ""]
        lines += _adapter_lines(content, sizes)
    lines += _trained_lines(found)
    lines += ["### Above PARA's increase", "", *_table(["task", "adapter", "size", "difference"])]
    for one in found["above_para"]:
        lines.append(_row([one["task"], _label(one), f"1/{one['size']}", _cell(one)]))
    lines += ["", "### Increase over PARA's", "", *_table(["size", "ratio, mean over tasks", "tasks"])]
    for size, one in found["increase_over_para"].items():
        lines.append(_row([f"1/{size}", _cell(one, 2, sign=False), ", ".join(one["tasks"])]))
    return "\n".join(lines)


def _ratio_lines(content: Mapping[str, Any], sizes: Sequence[str]) -> list[str]:
    cells = [
        "PARA's increase is within noise"
        if content["ratios"][size] is None
        else _cell(content["ratios"][size], 2, False)
        for size in sizes
    ]
    return [
        f"Ratio to PARA's increase: {'; '.join(f'1/{size} {cell}' for size, cell in zip(sizes, cells, strict=True))}."
    ]


def _adapter_lines(content: Mapping[str, Any], sizes: Sequence[str]) -> list[str]:
    within = f"size within {TOLERATED_INCREASE} nats: fim-lora / PARA"
    lines = _table(["adapter", "held-out loss", *(f"1/{size}: fim-lora / PARA" for size in sizes), within])
    for row in content["adapters"]:
        ours, para = row["ours"], row["reference"]
        cells = [f"{ours[size]:+.4f} / {para[size]:+.4f}" for size in sizes]
        kept = f"{row['ours_within']} / {row['reference_within']}"
        lines.append(_row([_label(row), f"{row['loss']:.4f}", *cells, kept]))
    return [*lines, ""]


def _trained_lines(found: Mapping[str, Any]) -> list[str]:
    """Adapters that were trained at the smaller size, against those that were cut to it."""
    rows = [(task, row) for task, content in found["tasks"].items() for row in content["adapters"] if "trained" in row]
    if not rows:
        return []
    sizes = list(rows[0][1]["trained"])
    lines = ["### Trained at the smaller size, against cut to it without further training", ""]
    lines += _table(["task", "adapter", *(f"1/{size}: trained / fim-lora" for size in sizes)])
    for task, row in rows:
        cells = [f"{row['trained'][size]:+.4f} / {row['ours'][size]:+.4f}" for size in sizes]
        lines.append(_row([task, _label(row), *cells]))
    return [*lines, ""]


def _label(row: Mapping[str, Any]) -> str:
    return f"r = {row['r']}, rate {row['learning_rate']:g}, seed {row['seed']}"


def _cell(value: Mapping[str, Any], digits: int = 4, sign: bool = True) -> str:
    form = f"{'+' if sign else ''}.{digits}f"
    low, high = value["ci95"]
    return f"{value['mean']:{form}} [{low:{form}}, {high:{form}}]"


def _table(headings: Sequence[str]) -> list[str]:
    return [_row(headings), "|" + " --- |" + " ---: |" * (len(headings) - 1)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
