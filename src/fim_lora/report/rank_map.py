"""The rank map, a picture: depth as rows, kinds of layer as columns, the rank as color and number."""

from collections.abc import Sequence
from os import PathLike

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath

from ..ranks.allocation import Allocation
from ..ranks.compressed import Compression
from ..ranks.layer_grid import LayerGrid, layer_grids
from .picture import Picture, literal

Result = Allocation | Compression

# Lengths in inches, so that the size of a cell does not depend on the number of cells.
_CELL_WIDTH, _CELL_HEIGHT = 0.52, 0.25
_PANEL_GAP = 0.75
_PANEL_TITLE_HEIGHT = 0.32
_TITLE_HEIGHT = 0.6
_COLOR_BAR_GAP, _COLOR_BAR_WIDTH, _COLOR_BAR_HEIGHT = 0.35, 0.16, 3.0
_MIN_COLOR_BAR_HEIGHT = 1.1
_LEFT = 0.5
_FONT_SIZE, _TITLE_SIZE = 8.0, 11.0

# If the ratio of the largest to the smallest rank is at least this, equal steps of color are equal factors of rank.
_LOGARITHMIC_FROM = 4
_TICKS_PER_INCH = 2.5
_COLOR_MAP = "viridis"


def draw_rank_map(result: Result, path: str | PathLike[str]) -> None:
    """Draw the ranks: one panel for each stack of layers, with depth from top to bottom and one column for each kind.

    Args:
        result: The allocation, or the compression, of which the ranks after it are drawn.
        path: The picture. Its suffix, such as `.png`, `.pdf` or `.svg`, determines the format.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If there are no layers, if the table of their names is too large, or if the suffix is not a known
            format.
    """
    rank_map_figure(result).write(path)


def rank_map_figure(result: Result) -> Picture:
    """The figure that `draw_rank_map` writes. Raises `ValueError` if there are no or too many cells."""
    grids = layer_grids(result.ranks)
    if not grids:
        raise ValueError("There is nothing to draw: there are no layers.")
    label_height = max(_text_width(kind) for grid in grids for kind in grid.kinds) + 0.1
    panel_height = max(max(len(grid.depths) for grid in grids) * _CELL_HEIGHT, _MIN_COLOR_BAR_HEIGHT)
    panel_widths = [_panel_width(grid) for grid in grids]
    width = _LEFT + sum(panel_widths) + _PANEL_GAP * (len(grids) - 1) + _COLOR_BAR_GAP + _COLOR_BAR_WIDTH + 0.6
    top = _TITLE_HEIGHT + _PANEL_TITLE_HEIGHT + label_height
    height = top + panel_height + 0.4

    picture = Picture(width, height)
    norm = _norm(result)
    x = _LEFT
    for grid, panel_width in zip(grids, panel_widths, strict=True):
        axes = picture.axes_at(x, top, len(grid.kinds) * _CELL_WIDTH, len(grid.depths) * _CELL_HEIGHT)
        _draw_cells(axes, grid, result, norm)
        _label_panel(axes, grid)
        title_y = 1 - (_TITLE_HEIGHT + 0.12) / height
        stack = literal(grid.stack) or "other layers"
        picture.text(x / width, title_y, stack, fontsize=_FONT_SIZE + 1, weight="bold", va="top")
        x += panel_width + _PANEL_GAP
    x += _COLOR_BAR_GAP - _PANEL_GAP
    bar_height = min(panel_height, _COLOR_BAR_HEIGHT)
    bar_axes = picture.axes_at(x, top, _COLOR_BAR_WIDTH, bar_height)
    _draw_color_bar(bar_axes, norm, _ticks(norm, result, max_ticks=round(bar_height * _TICKS_PER_INCH)))
    picture.text(_LEFT / width, 1, _title(result), fontsize=_TITLE_SIZE, va="top")
    if notes := _notes(grids, result):
        picture.text(_LEFT / width, 0.2 / height, notes, fontsize=_FONT_SIZE, color="0.35", va="top")
    return picture


def _draw_cells(axes: Axes, grid: LayerGrid, result: Result, norm: Normalize) -> None:
    rank_at = {place: float(result.ranks[name]) for place, name in grid.cells.items()}
    ranks = np.array([[rank_at.get((depth, kind), np.nan) for kind in grid.kinds] for depth in grid.depths])
    axes.patch.set(facecolor="0.96", edgecolor="0.8", hatch="//////")
    # A logarithmic scale has no rank of 0: such cells stay white.
    drawn = np.ma.masked_where(~(ranks > 0), ranks)
    mesh = axes.pcolormesh(drawn, norm=norm, cmap=_COLOR_MAP, edgecolors="white", linewidth=0.6)
    colors = mesh.to_rgba(np.maximum(ranks, 1))
    for row, column in np.argwhere(ranks == 0):
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor="white", edgecolor="0.8", linewidth=0.6))
    for row, column in np.argwhere(np.isfinite(ranks)):
        rank = ranks[row, column]
        color = "black" if rank == 0 else _text_color(colors[row, column, :3])
        x, y = column + 0.5, row + 0.5
        axes.text(x, y, f"{rank:.0f}", ha="center", va="center_baseline", fontsize=_FONT_SIZE, color=color)


def _label_panel(axes: Axes, grid: LayerGrid) -> None:
    axes.invert_yaxis()
    axes.xaxis.tick_top()
    kinds = [literal(kind) for kind in grid.kinds]
    axes.set_xticks(np.arange(len(grid.kinds)) + 0.5, kinds, rotation=90, fontsize=_FONT_SIZE)
    depths = ["–" if depth is None else str(depth) for depth in grid.depths]
    axes.set_yticks(np.arange(len(grid.depths)) + 0.5, depths, fontsize=_FONT_SIZE)
    if grid.depths != [None]:
        axes.set_ylabel("depth", fontsize=_FONT_SIZE)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _draw_color_bar(axes: Axes, norm: Normalize, ticks: Sequence[int]) -> None:
    bar = axes.figure.colorbar(ScalarMappable(norm=norm, cmap=_COLOR_MAP), cax=axes)
    bar.minorticks_off()
    bar.set_ticks(ticks, labels=[str(tick) for tick in ticks])
    bar.ax.tick_params(labelsize=_FONT_SIZE)
    bar.set_label("rank", fontsize=_FONT_SIZE + 1)


def _norm(result: Result) -> Normalize:
    smallest, largest = _rank_range(result)
    if smallest == largest:
        return Normalize(smallest - 0.5, largest + 0.5)
    if largest >= _LOGARITHMIC_FROM * smallest:
        return LogNorm(smallest, largest)
    return Normalize(smallest, largest)


def _ticks(norm: Normalize, result: Result, max_ticks: int) -> list[int]:
    """Integers from the smallest to the largest rank, evenly spread over the colors."""
    smallest, largest = _rank_range(result)
    fractions = np.linspace(0, 1, max_ticks)
    spread = norm.inverse(fractions) if smallest < largest else fractions * 0 + smallest
    return sorted({round(float(tick)) for tick in spread})


def _rank_range(result: Result) -> tuple[int, int]:
    """Smallest and largest rank of the layers that have an adapter."""
    ranks = [rank for rank in result.ranks.values() if rank > 0] or [1]
    return min(ranks), max(ranks)


def _title(result: Result) -> str:
    if isinstance(result, Compression):
        kind, size = result.size
        limit = "" if result.r_max is None else f", r_max = {result.r_max}"
        return (
            f"LoRA ranks after the compression, {kind} = {size:g}{limit}\n"
            f"parameters: {result.num_parameters:,} of {result.num_parameters_before:,} kept ({result.share:.1%})\n"
            f"{literal(result.criterion)}"
        )
    return (
        f"LoRA ranks from the eFIM, r = {result.r}\n"
        f"budget: {result.budget_used:,} of {result.budget:,} {result.budget_unit}\n"
        f"{result.num_batches:,} batches, {result.num_examples:,} examples"
    )


def _notes(grids: Sequence[LayerGrid], result: Result) -> str:
    """The meaning of cells without a color; empty if all cells have one."""
    notes = []
    if any(len(grid.cells) < len(grid.depths) * len(grid.kinds) for grid in grids):
        notes.append("hatched: no such layer")
    if result.dropped_layers:
        notes.append("white: no adapter")
    return ", ".join(notes)


def _text_color(color: np.ndarray) -> str:
    """Black or white, whichever has the higher contrast by WCAG 2."""
    linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ np.array([0.2126, 0.7152, 0.0722]))
    contrast_with_white, contrast_with_black = 1.05 / (luminance + 0.05), (luminance + 0.05) / 0.05
    return "white" if contrast_with_white > contrast_with_black else "black"


def _panel_width(grid: LayerGrid) -> float:
    """Width of the cells or of the title above them, whichever is larger."""
    return max(len(grid.kinds) * _CELL_WIDTH, _text_width(grid.stack, _FONT_SIZE + 1, weight="bold"))


def _text_width(text: str, size: float = _FONT_SIZE, weight: str = "normal") -> float:
    """Width in inches."""
    if not text:
        return 0.0
    path = TextPath((0, 0), literal(text), size=size, prop=FontProperties(weight=weight))
    return float(path.get_extents().width) / 72
