"""Plots of the gains of each method, and of the test loss by number of adapter parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gains import REFERENCE
from speeds_and_sizes import Size


def plot_gains(settings: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> None:
    """Plot the gain in test loss of every method with its interval, with one panel for each setting.

    Args:
        settings: The entry `settings` of `gains_report`.
        path: The PNG file to write.
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
    for index, (setting, methods) in enumerate(drawn.items()):
        _draw_gains(axes.flat[index], setting, methods, heights[index // columns])
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
    colors = ["tab:blue" if name.startswith("fim") else "tab:gray" for name, _ in ordered]
    heights = range(len(ordered))
    axis.errorbar(means, heights, xerr=np.abs(ends - np.array(means)), fmt="none", ecolor=colors)
    axis.scatter(means, heights, color=colors, s=14, zorder=3)
    axis.set_yticks(heights, [name for name, _ in ordered], fontsize=8)
    axis.set_ylim(len(ordered) - lines - 0.5, len(ordered) - 0.5)
    axis.tick_params(axis="x", labelbottom=True, labelsize=8)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_title(setting, fontsize=9)


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
