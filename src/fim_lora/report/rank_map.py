"""The rank map, a picture: depth as rows, kinds of layer as columns, the rank as color and number."""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from ..ranks.compressed import Compression
from .picture import Picture, literal
from .rank_colors import RankScale, gradient, text_color
from .rank_facts import Result, before_line, largest_allowed_rank, measured_line, size_line, uniform_rank
from .rank_panels import Panel, rank_panels
from .text_size import shortened, text_width, wrapped

# Lengths in inches, so that the size of a cell does not depend on the number of cells. A map of usual width can be
# read when it is shown with 400 pixels.
_CELL_WIDTH, _CELL_HEIGHT = 0.36, 0.2
_WIDE_CELL_WIDTH = 0.52  # for two ranks
_MAX_ROWS = 40  # stacks of more depths have several of them in a row, so that the map fits a page
_MAX_LINE_WIDTH = 3.2  # panels that are wider together are one below the other
_MIN_WIDTH = 3.6
_PANEL_GAP = 0.25
_STACK_HEIGHT = 0.2
_LABEL_GAP = 0.07
_BAR_GAP, _BAR_WIDTH, _BAR_LABEL_WIDTH = 0.22, 0.14, 0.75
_MIN_BAR_HEIGHT = 0.8
_MIN_TICK_DISTANCE, _TICKS_PER_INCH = 0.17, 1.5
_TITLE_HEIGHT, _LINE_HEIGHT, _HEADER_GAP = 0.22, 0.17, 0.1
_FONT_SIZE, _TITLE_SIZE = 8.0, 11.0
_LONGEST_LABEL = 40


@dataclass(frozen=True)
class _Place:
    """A panel, and where its cells begin: inches from the left and from the top of the map."""

    panel: Panel
    x: float
    y: float
    cell_width: float

    @property
    def right(self) -> float:
        """The end of the cells, or of the name of the stack above them."""
        name_end = self.x - _row_label_width(self.panel) + text_width(_stack(self.panel), _FONT_SIZE, "bold")
        return max(self.x + self.num_columns * self.cell_width, name_end)

    @property
    def num_columns(self) -> int:
        return max(len(self.panel.columns), 1)

    @property
    def bottom(self) -> float:
        return self.y + len(self.panel.rows) * _CELL_HEIGHT


def draw_rank_map(result: Result, path: str | PathLike[str], *, model: str = "", data: str = "") -> None:
    """Draw the ranks: one panel for each stack of layers, with depth from top to bottom and one column for each kind.

    Stacks of more than 40 depths have several depths in a row, which shows the mean of their ranks.

    Args:
        result: The allocation, or the compression, of which the ranks after it are drawn.
        path: The picture. Its suffix, such as `.png`, `.pdf` or `.svg`, determines the format.
        model: Name of the model or adapter, for the title.
        data: Name of the calibration data, for the title.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If there are no layers, if the table of their names is too large, or if the suffix is not a known
            format.
    """
    rank_map_figure(result, model=model, data=data).write(path)


def rank_map_figure(result: Result, *, model: str = "", data: str = "") -> Picture:
    """The figure that `draw_rank_map` writes. Raises `ValueError` if there are no or too many cells."""
    panels = rank_panels(result.ranks, _MAX_ROWS)
    scale = RankScale.of([*result.ranks.values(), uniform_rank(result)])
    with_before = isinstance(result, Compression) and len(set(result.ranks_before.values())) > 1
    places = _arranged(panels, _WIDE_CELL_WIDTH if with_before else _CELL_WIDTH)
    first, last = min(place.y for place in places), max(place.bottom for place in places)
    bar_x = max(place.right for place in places) + _BAR_GAP
    bar_height = max(last - first, _MIN_BAR_HEIGHT)
    width = max(bar_x + _BAR_WIDTH + _BAR_LABEL_WIDTH, _MIN_WIDTH)
    title, *facts = _header(result, model, data)
    titles = wrapped(title, width, _TITLE_SIZE, "bold")
    lines = [line for fact in facts for line in wrapped(fact, width, _FONT_SIZE)]
    notes = [line for note in _notes(panels, result, with_before) for line in wrapped(note, width, _FONT_SIZE)]

    top = len(titles) * _TITLE_HEIGHT + len(lines) * _LINE_HEIGHT + _HEADER_GAP
    height = top + first + bar_height + _HEADER_GAP + len(notes) * _LINE_HEIGHT
    picture = Picture(width, height)
    for number, line in enumerate(titles):
        y = 1 - number * _TITLE_HEIGHT / height
        picture.text(0, y, literal(line), fontsize=_TITLE_SIZE, weight="bold", va="top")
    for number, line in enumerate(lines):
        y = 1 - (len(titles) * _TITLE_HEIGHT + number * _LINE_HEIGHT) / height
        picture.text(0, y, literal(line), fontsize=_FONT_SIZE, va="top")
    for place in places:
        _draw_panel(picture, place, top, result, scale, with_before)
    _draw_bar(picture, bar_x, top + first, bar_height, result, scale)
    for number, line in enumerate(reversed(notes)):
        y = number * _LINE_HEIGHT / height
        picture.text(0, y, literal(line), fontsize=_FONT_SIZE, color="0.3", va="bottom")
    return picture


def _arranged(panels: Sequence[Panel], cell_width: float) -> list[_Place]:
    """Panels side by side as far as they fit, otherwise one below the other."""
    places: list[_Place] = []
    line: list[Panel] = []
    line_top = 0.0

    def end_line() -> float:
        y = line_top + max(_label_height(panel) for panel in line)
        x = 0.0
        for panel in line:
            x += _row_label_width(panel)
            places.append(_Place(panel, x, y, cell_width))
            x = places[-1].right + _PANEL_GAP
        return max(place.bottom for place in places[-len(line) :]) + _PANEL_GAP

    for panel in panels:
        if line and sum(_width(one, cell_width) + _PANEL_GAP for one in [*line, panel]) > _MAX_LINE_WIDTH + _PANEL_GAP:
            line_top = end_line()
            line = []
        line.append(panel)
    end_line()
    return places


def _draw_panel(
    picture: Picture, place: _Place, top: float, result: Result, scale: RankScale, with_before: bool
) -> None:
    panel = place.panel
    axes = picture.axes_at(
        place.x, top + place.y, place.num_columns * place.cell_width, len(panel.rows) * _CELL_HEIGHT
    )
    _draw_cells(axes, panel, result, scale, with_before)
    axes.invert_yaxis()
    axes.xaxis.tick_top()
    kinds = [literal(shortened(kind, _LONGEST_LABEL)) for kind in panel.columns]
    axes.set_xticks(np.arange(len(kinds)) + 0.5, kinds, rotation=90, fontsize=_FONT_SIZE)
    rows = [literal(shortened(row, _LONGEST_LABEL)) for row in panel.rows]
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows, fontsize=_FONT_SIZE)
    axes.tick_params(length=0, pad=3)
    axes.spines[:].set_visible(False)
    width, height = picture.get_size_inches()
    x, label_height = place.x - _row_label_width(panel), _label_height(panel)
    y = height - top - place.y
    options: dict[str, Any] = {"fontsize": _FONT_SIZE, "color": "black"}
    if panel.columns:
        picture.text((place.x - 0.05) / width, (y + 0.05) / height, "depth", ha="right", va="bottom", **options)
    picture.text(x / width, (y + label_height) / height, literal(_stack(panel)), weight="bold", va="top", **options)


def _draw_cells(axes: Axes, panel: Panel, result: Result, scale: RankScale, with_before: bool) -> None:
    ranks, uniform = panel.means(result.ranks), uniform_rank(result)
    before = panel.means(result.ranks_before) if isinstance(result, Compression) and with_before else None
    axes.patch.set(facecolor="white", edgecolor="0.75", hatch="//////")
    colors = scale.colors(np.nan_to_num(ranks, nan=1))
    colors = np.dstack([np.where(ranks[..., None] > 0, colors, 1.0), np.isfinite(ranks)])
    axes.pcolormesh(colors, edgecolors="white", linewidth=0.8)
    for row, column in np.argwhere(ranks == 0):
        axes.add_patch(Rectangle((column + 0.06, row + 0.1), 0.88, 0.8, fill=False, edgecolor="0.6", linewidth=0.6))
    for row, column in np.argwhere(np.isfinite(ranks)):
        rank = ranks[row, column]
        text = _rounded(rank)
        if before is not None:
            text += f"/{_rounded(before[row, column])}"
        color = text_color(tuple(colors[row, column, :3].tolist()))
        weight = "bold" if rank > uniform else "normal"
        options: dict[str, Any] = {"fontsize": _FONT_SIZE, "color": color, "weight": weight}
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center_baseline", **options)


def _draw_bar(picture: Picture, x: float, y: float, height: float, result: Result, scale: RankScale) -> None:
    """The colors of all ranks, with the uniform rank and `r_max` among the ticks."""
    axes = picture.axes_at(x, y, _BAR_WIDTH, height)
    axes.imshow(gradient(np.linspace(0, 1, 256))[:, None], aspect="auto", origin="lower", extent=(0, 1, 0, 1))
    places: list[tuple[float, str]] = []
    for rank, name in _marks(result, scale):
        place = float(scale.position(rank))
        axes.axhline(place, color="black", linewidth=1.2, clip_on=False, xmax=1.35)
        places.append((place, f"{rank:.3g} {name}"))
    marked = [place for place, _ in places]
    for tick in scale.ticks(round(height * _TICKS_PER_INCH)):
        place = float(scale.position(tick))
        if all(abs(place - other) * height >= _MIN_TICK_DISTANCE for other in marked):
            places.append((place, str(tick)))
    axes.set_xticks([])
    axes.yaxis.tick_right()
    axes.set_yticks([place for place, _ in places], [text for _, text in places], fontsize=_FONT_SIZE)
    axes.tick_params(length=3, pad=3)
    axes.set_title("rank", fontsize=_FONT_SIZE, pad=4)


def _marks(result: Result, scale: RankScale) -> list[tuple[float, str]]:
    """Ranks to compare with, and their names on the color bar."""
    uniform, r_max = uniform_rank(result), largest_allowed_rank(result)
    if uniform == r_max:
        return [(uniform, "uniform,\nr_max")]
    return [(uniform, "uniform")] + ([(r_max, "r_max")] if r_max is not None and r_max <= scale.largest else [])


def _header(result: Result, model: str, data: str) -> list[str]:
    """The title and the lines below it."""
    is_compression = isinstance(result, Compression)
    lines = ["LoRA rank of every layer" + (", compressed" if is_compression else "")]
    lines += [model] if model else []
    lines.append(f"{data}: {measured_line(result)}" if data else measured_line(result))
    return [*lines, size_line(result), *([before_line(result)] if isinstance(result, Compression) else [])]


def _notes(panels: Sequence[Panel], result: Result, with_before: bool) -> list[str]:
    """What cells mean that are not a rank as a color."""
    uniform, r_max = uniform_rank(result), largest_allowed_rank(result)
    notes = []
    if with_before:
        notes.append("after/before")
    if any(rank > uniform for rank in result.ranks.values()):
        same_size = "" if not isinstance(result, Compression) else ", which has the same size"
        notes.append(f"bold: above uniform rank {uniform:.3g}{same_size}")
    if r_max is not None and r_max > max(*result.ranks.values(), uniform):
        notes.append(f"r_max = {r_max} is not reached")
    if result.dropped_layers:
        notes.append("white: no adapter")
    if any(panel.has_empty_cells for panel in panels):
        notes.append("hatched: no such layer")
    if any(panel.depths_per_row > 1 for panel in panels):
        notes.append("a row of several depths: mean rank")
    return notes


def _stack(panel: Panel) -> str:
    return shortened(panel.stack, _LONGEST_LABEL) or "other layers"


def _width(panel: Panel, cell_width: float) -> float:
    return _Place(panel, _row_label_width(panel), 0, cell_width).right


def _row_label_width(panel: Panel) -> float:
    names = [shortened(row, _LONGEST_LABEL) for row in panel.rows] + (["depth"] if panel.columns else [])
    return max(text_width(name, _FONT_SIZE) for name in names) + _LABEL_GAP


def _label_height(panel: Panel) -> float:
    """Height of the name of the stack and of the kinds of layer above the cells."""
    kinds = [text_width(shortened(kind, _LONGEST_LABEL), _FONT_SIZE) for kind in panel.columns]
    return _STACK_HEIGHT + max(kinds, default=0) + _LABEL_GAP


def _rounded(rank: float) -> str:
    """A whole number; a mean of adapted and dropped layers is never 0."""
    return f"{max(rank, 1):.0f}" if rank > 0 else "0"
