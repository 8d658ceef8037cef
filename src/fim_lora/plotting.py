"""The rank map: depth by kind of layer, the rank as colour and number."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath

from .layer_grid import LayerGrid, layer_grids
from .rank_allocation import RankAllocation

# Lengths in inches, so that a cell has the same size however many there are.
_CELL_WIDTH, _CELL_HEIGHT = 0.52, 0.25
_PANEL_GAP = 0.75
_PANEL_TITLE_HEIGHT = 0.32
_TITLE_HEIGHT = 0.6
_COLOUR_BAR_GAP, _COLOUR_BAR_WIDTH, _COLOUR_BAR_HEIGHT = 0.35, 0.16, 3.0
_LEAST_COLOUR_BAR_HEIGHT = 1.1
_MARGIN = 0.2
_FONT_SIZE, _TITLE_SIZE = 8.0, 11.0

_DOTS_PER_INCH = 150
# The largest side that the renderer can draw is 2**16 dots.
_MAX_DOTS = 30_000
# From this ratio of largest to smallest rank on, equal steps of colour are equal factors.
_LOGARITHMIC_FROM = 4
_TICKS_PER_INCH = 2.5
_COLOUR_MAP = "viridis"


def draw_rank_map(allocation: RankAllocation, path: str | PathLike[str]) -> None:
    """Draw the ranks: one panel for each stack of layers, depth downwards, kinds of layer side by side.

    Args:
        allocation: The allocation.
        path: The picture; the format follows from its suffix, such as `.png`, `.pdf` or `.svg`.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If there are no layers, their names make too large a table, or the suffix is no known format.
    """
    grids = layer_grids(allocation.ranks)
    if not grids:
        raise ValueError("There is nothing to draw: the allocation has no layers.")
    figure = _figure(grids, allocation)
    dots = min(_DOTS_PER_INCH, _MAX_DOTS / max(figure.get_size_inches()))
    figure.savefig(path, dpi=dots, bbox_inches="tight", pad_inches=_MARGIN, facecolor="white")


def _figure(grids: Sequence[LayerGrid], allocation: RankAllocation) -> Figure:
    label_height = max(_text_width(kind) for grid in grids for kind in grid.kinds) + 0.1
    panel_height = max(max(len(grid.depths) for grid in grids) * _CELL_HEIGHT, _LEAST_COLOUR_BAR_HEIGHT)
    widths = [_panel_width(grid) for grid in grids]
    left = 0.5
    width = left + sum(widths) + _PANEL_GAP * (len(grids) - 1) + _COLOUR_BAR_GAP + _COLOUR_BAR_WIDTH + 0.6
    top = _TITLE_HEIGHT + _PANEL_TITLE_HEIGHT + label_height
    height = top + panel_height + 0.4

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    norm = _norm(allocation)

    def add_axes(x: float, y: float, axes_width: float, axes_height: float) -> Axes:
        """Axes by inches from the left and the top."""
        return figure.add_axes(
            (x / width, (height - y - axes_height) / height, axes_width / width, axes_height / height)
        )

    x = left
    for grid, panel_width in zip(grids, widths, strict=True):
        axes = add_axes(x, top, len(grid.kinds) * _CELL_WIDTH, len(grid.depths) * _CELL_HEIGHT)
        _draw_panel(axes, grid, allocation, norm)
        title_y = 1 - (_TITLE_HEIGHT + 0.12) / height
        stack = _literal(grid.stack) or "other layers"
        figure.text(x / width, title_y, stack, fontsize=_FONT_SIZE + 1, weight="bold", va="top")
        x += panel_width + _PANEL_GAP
    x += _COLOUR_BAR_GAP - _PANEL_GAP
    bar_height = min(panel_height, _COLOUR_BAR_HEIGHT)
    _draw_colour_bar(
        add_axes(x, top, _COLOUR_BAR_WIDTH, bar_height), norm, allocation, round(bar_height * _TICKS_PER_INCH)
    )
    figure.text(left / width, 1, _title(allocation), fontsize=_TITLE_SIZE, va="top")
    notes = ["hatched: no such layer"] * any(len(grid.cells) < len(grid.depths) * len(grid.kinds) for grid in grids)
    notes += ["white: no adapter"] * bool(allocation.dropped_layers)
    if notes:
        figure.text(left / width, 0.2 / height, ", ".join(notes), fontsize=_FONT_SIZE, color="0.35", va="top")
    return figure


def _draw_panel(axes: Axes, grid: LayerGrid, allocation: RankAllocation, norm: Normalize) -> None:
    ranks = np.full((len(grid.depths), len(grid.kinds)), np.nan)
    for row, depth in enumerate(grid.depths):
        for column, kind in enumerate(grid.kinds):
            name = grid.cells.get((depth, kind))
            if name is not None:
                ranks[row, column] = allocation.ranks[name]
    axes.patch.set(facecolor="0.96", edgecolor="0.8", hatch="//////")
    # A rank of 0 has no place on a scale of factors: such cells stay white.
    drawn = np.ma.masked_where(~(ranks > 0), ranks)
    mesh = axes.pcolormesh(drawn, norm=norm, cmap=_COLOUR_MAP, edgecolors="white", linewidth=0.6)
    colours = mesh.to_rgba(np.maximum(ranks, 1))
    for row, column in np.argwhere(ranks == 0):
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor="white", edgecolor="0.8", linewidth=0.6))
    for row, column in np.argwhere(np.isfinite(ranks)):
        axes.text(
            column + 0.5,
            row + 0.5,
            f"{ranks[row, column]:.0f}",
            ha="center",
            va="center_baseline",
            fontsize=_FONT_SIZE,
            color="black" if ranks[row, column] == 0 else _text_colour(colours[row, column, :3]),
        )
    axes.invert_yaxis()
    axes.xaxis.tick_top()
    kinds = [_literal(kind) for kind in grid.kinds]
    axes.set_xticks(np.arange(len(grid.kinds)) + 0.5, kinds, rotation=90, fontsize=_FONT_SIZE)
    depths = ["–" if depth is None else str(depth) for depth in grid.depths]
    axes.set_yticks(np.arange(len(grid.depths)) + 0.5, depths, fontsize=_FONT_SIZE)
    if grid.depths != [None]:
        axes.set_ylabel("depth", fontsize=_FONT_SIZE)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _draw_colour_bar(axes: Axes, norm: Normalize, allocation: RankAllocation, max_ticks: int) -> None:
    figure = axes.figure
    bar = figure.colorbar(ScalarMappable(norm=norm, cmap=_COLOUR_MAP), cax=axes)
    bar.minorticks_off()
    ticks = _ticks(norm, allocation, max_ticks)
    bar.set_ticks(ticks, labels=[str(tick) for tick in ticks])
    bar.ax.tick_params(labelsize=_FONT_SIZE)
    bar.set_label("rank", fontsize=_FONT_SIZE + 1)


def _range(allocation: RankAllocation) -> tuple[int, int]:
    """Smallest and largest rank of the layers that have an adapter."""
    ranks = [rank for rank in allocation.ranks.values() if rank > 0] or [1]
    return min(ranks), max(ranks)


def _norm(allocation: RankAllocation) -> Normalize:
    smallest, largest = _range(allocation)
    if smallest == largest:
        return Normalize(smallest - 0.5, largest + 0.5)
    if largest >= _LOGARITHMIC_FROM * smallest:
        return LogNorm(smallest, largest)
    return Normalize(smallest, largest)


def _ticks(norm: Normalize, allocation: RankAllocation, max_ticks: int) -> list[int]:
    """Whole numbers from the smallest to the largest rank, evenly spread over the colours."""
    smallest, largest = _range(allocation)
    fractions = np.linspace(0, 1, max_ticks)
    spread = norm.inverse(fractions) if smallest < largest else fractions * 0 + smallest
    return sorted({round(float(tick)) for tick in spread})


def _title(allocation: RankAllocation) -> str:
    unit = "ranks" if allocation.fim_config.budget == "rank" else "parameters"
    return (
        f"LoRA ranks from the eFIM, r = {allocation.r}\n"
        f"budget: {allocation.budget_used:,} of {allocation.budget:,} {unit}\n"
        f"{allocation.num_batches:,} batches, {allocation.num_examples:,} examples"
    )


def _text_colour(colour: np.ndarray) -> str:
    """Black or white, whichever has the higher contrast by WCAG 2."""
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ np.array([0.2126, 0.7152, 0.0722]))
    contrast_with_white, contrast_with_black = 1.05 / (luminance + 0.05), (luminance + 0.05) / 0.05
    return "white" if contrast_with_white > contrast_with_black else "black"


def _panel_width(grid: LayerGrid) -> float:
    """Room for the cells and for the title above them."""
    return max(len(grid.kinds) * _CELL_WIDTH, _text_width(grid.stack, _FONT_SIZE + 1, weight="bold"))


def _text_width(text: str, size: float = _FONT_SIZE, weight: str = "normal") -> float:
    if not text:
        return 0.0
    path = TextPath((0, 0), _literal(text), size=size, prop=FontProperties(weight=weight))
    return float(path.get_extents().width) / 72


def _literal(text: str) -> str:
    """The text for matplotlib, which takes what stands between dollars for a formula."""
    return text.replace("$", r"\$")
