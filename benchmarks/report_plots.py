"""Plots of the gains of each method, and of the test loss by number of adapter parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gains import REFERENCE
from speeds_and_sizes import Size

SHOWN = {
    "cut-from-fim-ranks": "begin wide with FIM ranks, cut",
    "cut": "begin wide, cut at 20 %",
    "fim-sum-1/2": "FIM ranks, default",
    "fim-rank": "FIM ranks, as proposed",
    "adalora": "AdaLoRA",
    "eva-rho-2": "EVA",
    "lora-ga": "LoRA-GA",
    "uniform-double-rank": "twice the parameters",
}
"""The methods of the picture in words, from top to bottom."""

_OURS = ("cut", "fim-")
_RANKS = ("r = 2", "r = 8")
_TASK_NAMES = {"banking77": "Banking77", "sst2": "SST-2", "gsm8k": "GSM8K", "german": "German text"}


def plot_gains(settings: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> None:
    """Plot the gain in test loss of the main methods, with one panel for each short task and rank.

    The panels share their rows. Runs of one task and rank in different precisions are in one panel, each compared with
    uniform LoRA in its own precision.

    Args:
        settings: The entry `settings` of `gains_report`.
        path: The PNG file to write.
    """
    panels = _panels(settings)
    plt = _pyplot()
    size = 2.6 + 1.9 * len(panels), 3.4
    figure, axes = plt.subplots(1, max(1, len(panels)), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis, (title, methods) in zip(axes[0], panels.items(), strict=False):
        _draw_gains(axis, title, methods)
    names = list(reversed(SHOWN.values()))
    axes[0, 0].set_yticks(range(len(names)), names, fontsize=9)
    figure.supxlabel(
        "gain in test loss over uniform LoRA of equal size, nats (95 % interval); right is better", fontsize=9
    )
    figure.savefig(path, dpi=140, metadata={"Software": None})
    plt.close(figure)


def _panels(settings: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Title to the gains of each method; all linear layers of the short tasks only."""
    panels: dict[str, dict[str, Mapping[str, Any]]] = {}
    for setting, methods in settings.items():
        task, targets, rank, *_ = setting.split(", ")
        shown = {method: numbers for method, numbers in methods.items() if method in SHOWN}
        if task in _TASK_NAMES and targets == "all-linear" and shown and rank in _RANKS:
            title = f"{_TASK_NAMES[task]}\n{rank}"
            # Settings in float32 come before those of the same name in bfloat16, and are kept.
            panels[title] = shown | panels.get(title, {})
    return panels


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _draw_gains(axis: Any, title: str, methods: Mapping[str, Mapping[str, Any]]) -> None:
    for height, method in enumerate(reversed(SHOWN)):
        if method not in methods:
            continue
        mean, (low, high) = methods[method]["mean_loss_gain"], methods[method]["loss_ci95"]
        color = "tab:blue" if method.startswith(_OURS) else "dimgray"
        axis.plot([low, high], [height, height], color=color, linewidth=2)
        axis.plot(mean, height, color=color, marker="o" if method.startswith(_OURS) else "s", markersize=5)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.tick_params(axis="x", labelsize=8)
    axis.locator_params(axis="x", nbins=4)
    axis.grid(axis="y", color="lightgray", linewidth=0.5)
    axis.set_title(title, fontsize=9)


def plot_sizes(sizes: Mapping[str, Mapping[str, Mapping[int, Size]]], path: Path) -> None:
    """Plot the test loss by number of adapter parameters, with one panel for each setting.

    Args:
        sizes: The result of `sizes_by_setting`.
        path: The PNG file to write.
    """
    styles = _line_styles({method for methods in sizes.values() for method in methods})
    plt = _pyplot()
    figure, axes = plt.subplots(len(sizes), 1, figsize=(9, 4 * len(sizes)), squeeze=False, layout="constrained")
    for axis, (setting, methods) in zip(axes[:, 0], sizes.items(), strict=True):
        _draw_sizes(axis, setting, methods, styles)
    axes[-1, 0].set_xlabel("adapter parameters (ticks: uniform LoRA)", fontsize=9)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def _line_styles(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Line styles that differ in more than color. The line of uniform LoRA is thick and black."""
    other_methods = sorted(method for method in methods if method != REFERENCE)
    styles: dict[str, dict[str, Any]] = {
        method: {
            "color": f"C{index % 10}",
            "marker": "s^Dvx"[index % 5],
            "linestyle": "-" if index < 10 else "--",
            "linewidth": 1.2,
        }
        for index, method in enumerate(other_methods)
    }
    return styles | {REFERENCE: {"color": "black", "marker": "o", "linestyle": "-", "linewidth": 2.2}}


def _draw_sizes(
    axis: Any, setting: str, methods: Mapping[str, Mapping[int, Size]], styles: Mapping[str, Mapping[str, Any]]
) -> None:
    for method, by_rank in sorted(methods.items()):
        points = sorted(by_rank.values())
        axis.errorbar(
            [size.parameters for size in points],
            [size.loss for size in points],
            yerr=[size.error for size in points],
            label=method,
            markersize=4,
            capsize=2,
            **styles[method],
        )
    axis.set_xscale("log")
    axis.minorticks_off()
    ranks = methods[REFERENCE]
    ticks = [size.parameters for size in ranks.values()]
    axis.set_xticks(ticks, [f"{size.parameters:,.0f}\nr = {rank}" for rank, size in ranks.items()], fontsize=8)
    axis.set_title(setting, fontsize=10)
    axis.set_ylabel("test loss, nats (± standard error)", fontsize=9)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
