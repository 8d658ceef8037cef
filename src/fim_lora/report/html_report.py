"""The report: one HTML file with everything that a result says, which needs no network.

The page is `report.html` in this folder. All numbers are in it without JavaScript, too; a script moves the size.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from importlib.resources import files
from io import BytesIO
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context

from ..ranks.compressed import Compression
from ..ranks.size_curve import SizeCurve
from ..ranks.sizes import size_rows
from .html import cell_colors, html_ranks
from .picture import Picture
from .rank_colors import RankScale
from .rank_facts import Result
from .report_rows import layer_rows, provenance_rows, result_facts
from .size_curve import size_curve_figure

_NUM_LEGEND_RANKS = 8


def html_report(
    result: Result,
    *,
    model: str,
    facts: Mapping[str, str],
    provenance: Mapping[str, Any],
    curve: SizeCurve | None = None,
) -> str:
    """The report as the text of an HTML file.

    Args:
        result: The allocation or compression.
        model: Name of the model or adapter, for the title; may be empty.
        facts: Heading to text: where the result comes from.
        provenance: JSON values that were recorded with the result.
        curve: The sizes that a compression could have had. Without them, the report has no slider.

    Returns:
        The page. Every name and value is escaped in it.

    Raises:
        ValueError: If `curve` has other layers or sizes than the compression, or if a table of the layers is too
            large to show.
    """
    points = [] if curve is None else curve.points
    ranks = {*result.ranks.values(), *(rank for point in points for rank in point.ranks.values())}
    scale = RankScale.of(ranks)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    return page.render(
        title="LoRA adapter, compressed" if isinstance(result, Compression) else "LoRA rank of every layer",
        model=model,
        facts=dict(facts) | result_facts(result),
        before_and_after=result.rows() if isinstance(result, Compression) else None,
        sizes=None if curve is None else _sizes(result, curve, {rank: cell_colors(rank, scale) for rank in ranks}),
        rank_tables=Markup(html_ranks(result.ranks, scale)),
        legend=[(rank, *cell_colors(rank, scale)) for rank in scale.ticks(_NUM_LEGEND_RANKS)],
        has_dropped_layers=0 in ranks,
        layers=layer_rows(result),
        provenance=list(provenance_rows(provenance)),
    )


def _sizes(result: Result, curve: SizeCurve, colors: Mapping[int, tuple[str, str]]) -> dict[str, Any]:
    """What the page shows of the sizes: a table, a picture with a place for each size, and values for the script."""
    chosen = [number for number, point in enumerate(curve.points) if point.ranks == result.ranks]
    if not isinstance(result, Compression) or not chosen:
        raise ValueError("The sizes are not those of this compression: none of them has its ranks.")
    picture = size_curve_figure(curve, result, with_title=False)
    rows = _size_rows(curve)
    top, bottom, *places = _places(picture, curve)
    return {
        "rows": rows,
        "chosen": chosen[0],
        "picture": _as_data(picture),
        "top": top,
        "bottom": bottom,
        "script": {
            "points": [
                {"shown": row, "place": place, "ranks": list(point.ranks.values())}
                for row, place, point in zip(rows[1:], places, curve.points, strict=True)
            ],
            "colors": colors,
        },
    }


def _size_rows(curve: SizeCurve) -> list[list[str]]:
    """One row for each size, with the measured loss where there is one."""
    heading, *rows = size_rows(curve.points)
    measured = dict(curve.measured)
    losses = [f"{measured[point.parameters]:+.2g}" if point.parameters in measured else "" for point in curve.points]
    norms = [f"{point.dropped_norm:.1%}" for point in curve.points]
    return [
        [*heading, "measured loss", "dropped share of ‖ΔW‖²"],
        *([*row, loss, norm] for row, loss, norm in zip(rows, losses, norms, strict=True)),
    ]


def _as_data(picture: Picture) -> str:
    """The picture as the URL of an image: a page cannot run what is in it."""
    buffer = BytesIO()
    # Without a date, and with names from a fixed salt and not from a random one, a result always gives the same page.
    with rc_context({"svg.hashsalt": "fim-lora"}):
        # The whole figure and not only what is drawn, whose extent depends on the renderer: `_places` needs it.
        picture.savefig(
            buffer, format="svg", bbox_inches=picture.bbox_inches, facecolor="white", metadata={"Date": None}
        )
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _places(picture: Picture, curve: SizeCurve) -> list[float]:
    """Percent of the picture above and below the axes, and the place of each size in percent from the left."""
    first, last = (picture.axes[place].get_position() for place in (0, -1))
    sizes = [(point.parameters, 0) for point in curve.points]
    lefts = picture.transFigure.inverted().transform(picture.axes[-1].transData.transform(sizes))[:, 0]
    return [round(100 * float(part), 3) for part in (1 - first.y1, last.y0, *lefts)]
