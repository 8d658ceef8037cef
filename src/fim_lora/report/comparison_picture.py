"""The picture of a comparison: one panel for each kind of layer, with the two ranks at every depth as lines."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from os import PathLike
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator

from ..ranks.comparison import RankComparison
from .picture import Picture, literal
from .text_size import shortened

# Lengths in inches.
_PANEL_WIDTH, _PANEL_HEIGHT = 2.1, 1.3
_GAP_X, _GAP_Y = 0.3, 0.5
_LEFT, _TOP, _STACK_HEIGHT = 0.45, 0.75, 0.35
_COLUMNS = 3
_FONT_SIZE, _TITLE_SIZE = 8.0, 11.0

# Each panel takes the renderer about 20 ms.
_MAX_PANELS = 500
# Longer names are cut in the middle.
_MAX_TITLE = 34

# Two colors that color-blind people can distinguish; prints without color have the markers and the dashes.
_STYLES: tuple[dict[str, Any], dict[str, Any]] = (
    {"color": "#0072B2", "marker": "o", "linestyle": "-", "markersize": 4.5},
    {"color": "#D55E00", "marker": "s", "linestyle": "--", "markersize": 2.5},
)


@dataclass(frozen=True)
class _Panel:
    """One kind of layer: its depths, and both ranks at each of them, NaN where a result has no such layer."""

    title: str
    depths: Sequence[int]
    ranks: tuple[Sequence[float], Sequence[float]]


def draw_comparison(comparison: RankComparison, labels: tuple[str, str], path: str | PathLike[str]) -> None:
    """Draw both ranks of every layer.

    Args:
        comparison: The ranks of two results.
        labels: Their names.
        path: The picture. Its suffix, such as `.png`, `.pdf` or `.svg`, determines the format.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If there are no layers or too many kinds of them, or if the suffix is not a known format.
    """
    comparison_figure(comparison, labels).write(path)


def comparison_figure(comparison: RankComparison, labels: tuple[str, str]) -> Picture:
    """The figure that `draw_comparison` writes. Raises `ValueError` if there are no or too many panels."""
    stacks = list(_stacks(comparison))
    count = sum(len(panels) for _, panels in stacks)
    if not count:
        raise ValueError("There is nothing to draw: there are no layers.")
    if count > _MAX_PANELS:
        raise ValueError(
            f"There are {count:,} kinds of layers, more than the {_MAX_PANELS} that can be drawn: use the table."
        )
    columns = min(_COLUMNS, max(len(panels) for _, panels in stacks))
    heights = [_STACK_HEIGHT + ceil(len(panels) / columns) * (_PANEL_HEIGHT + _GAP_Y) for _, panels in stacks]
    width, height = _LEFT + columns * (_PANEL_WIDTH + _GAP_X), _TOP + sum(heights)
    picture = Picture(width, height)
    picture.text(_LEFT / width, 1, _title(comparison), fontsize=_TITLE_SIZE, va="top")
    _draw_legend(picture, labels)
    top = _TOP
    for (stack, panels), stack_height in zip(stacks, heights, strict=True):
        heading = literal(stack) or "other layers"
        picture.text(_LEFT / width, 1 - top / height, heading, fontsize=_FONT_SIZE + 1, weight="bold", va="top")
        for number, panel in enumerate(panels):
            row, column = divmod(number, columns)
            x, y = _LEFT + column * (_PANEL_WIDTH + _GAP_X), top + _STACK_HEIGHT + row * (_PANEL_HEIGHT + _GAP_Y)
            _draw_panel(picture.axes_at(x, y, _PANEL_WIDTH, _PANEL_HEIGHT), panel, comparison, is_first=column == 0)
        top += stack_height
    return picture


def _stacks(comparison: RankComparison) -> Iterator[tuple[str, list[_Panel]]]:
    """The panels of each stack of layers; a layer without a depth has a panel of its own."""
    for grid in comparison.grids:
        panels = []
        for kind in grid.kinds:
            depths = [depth for depth in grid.depths if (depth, kind) in grid.cells]
            names = [grid.cells[depth, kind] for depth in depths]
            first, second = (
                [float(ranks.get(name, np.nan)) for name in names] for ranks in (comparison.first, comparison.second)
            )
            panels.append(_Panel(kind, [depth or 0 for depth in depths], (first, second)))
        yield grid.stack, panels


def _draw_panel(axes: Axes, panel: _Panel, comparison: RankComparison, is_first: bool) -> None:
    for ranks, style in zip(panel.ranks, _STYLES, strict=True):
        axes.plot(panel.depths, ranks, linewidth=1, clip_on=False, **style)
    axes.set_title(literal(shortened(panel.title, _MAX_TITLE)), fontsize=_FONT_SIZE, pad=3)
    every = [*comparison.first.values(), *comparison.second.values()]
    largest = max(*every, 1)
    # Equal heights are equal factors of rank, except below 1: a logarithm has no place for rank 0.
    axes.set_yscale("symlog", base=2, linthresh=1)
    axes.set_ylim(-0.15 if 0 in every else 0.85, largest * 1.1)
    ticks = [*([0] if 0 in every else []), *(2**power for power in range(largest.bit_length()))]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_yticks(ticks, [str(tick) for tick in ticks] if is_first else [])
    if is_first:
        axes.set_ylabel("rank", fontsize=_FONT_SIZE)
    if len(panel.depths) > 1:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    else:
        axes.set_xticks(panel.depths)
        axes.xaxis.set_major_formatter(NullFormatter())
    axes.tick_params(labelsize=_FONT_SIZE - 1, length=2)
    axes.grid(color="0.9", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_legend(picture: Picture, labels: tuple[str, str]) -> None:
    lines = [
        Line2D([], [], label=literal(shortened(label, _MAX_TITLE)), **style)
        for label, style in zip(labels, _STYLES, strict=True)
    ]
    width, height = picture.get_size_inches()
    place = ((_LEFT - 0.1) / width, 1 - 0.2 / height)
    picture.legend(
        handles=lines, loc="upper left", bbox_to_anchor=place, ncols=1, frameon=False, fontsize=_FONT_SIZE, borderpad=0
    )


def _title(comparison: RankComparison) -> str:
    correlation = comparison.correlation
    if correlation is None:
        return "LoRA ranks by depth"
    return f"LoRA ranks by depth; rank correlation {correlation:.2f} over {len(comparison.common):,} layers"
