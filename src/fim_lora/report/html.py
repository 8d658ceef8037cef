"""Tables as HTML, for notebooks and for the report."""

from collections.abc import Mapping, Sequence
from html import escape

from ..ranks.allocation import Allocation
from .rank_colors import RankScale, hexadecimal, text_color
from .rank_panels import Panel, rank_panels


def html_table(rows: Sequence[Sequence[str]], heading: str) -> str:
    """A table of text, with the heading above it.

    Args:
        rows: The cells, as text and not as HTML: every one is escaped. The first row names the columns.
        heading: Text above the table.

    Returns:
        An HTML fragment.
    """
    names, *others = rows
    lines = [f"<tr>{_cells('th', names)}</tr>", *(f"<tr>{_cells('td', row)}</tr>" for row in others)]
    return f"<div>\n<p>{escape(heading)}</p>\n<table>\n{chr(10).join(lines)}\n</table>\n</div>"


def html_allocation(allocation: Allocation) -> str:
    """The ranks of an allocation in color, with the size and the measurement above them, as an HTML fragment."""
    heading, _, _ = str(allocation).partition("\n")
    return f"<div>\n<p>{escape(heading)}</p>\n{html_ranks(allocation.ranks)}\n</div>"


def html_ranks(ranks: Mapping[str, int], scale: RankScale | None = None) -> str:
    """Tables of ranks in color, one for each stack of layers: depth as rows and kinds of layer as columns.

    Args:
        ranks: Layer name to rank.
        scale: Colors of the ranks. By default from the smallest to the largest rank.

    Returns:
        An HTML fragment. Every cell has the layer's number among `ranks` as its `data-layer`, and its name as its
        `title`.
    """
    numbers = {name: number for number, name in enumerate(ranks)}
    colors = RankScale.of(ranks.values()) if scale is None else scale
    return "\n".join(_rank_table(panel, ranks, numbers, colors) for panel in rank_panels(ranks))


def cell_colors(rank: int, scale: RankScale) -> tuple[str, str]:
    """Background and text of a rank, as HTML writes colors."""
    background = scale.color(rank)
    return hexadecimal(background), text_color(background)


def _rank_table(panel: Panel, ranks: Mapping[str, int], numbers: Mapping[str, int], scale: RankScale) -> str:
    def cell(names: Sequence[str]) -> str:
        if not names:
            return "<td></td>"
        [name] = names
        background, text = cell_colors(ranks[name], scale)
        style = f"text-align: right; background: {background}; color: {text}"
        return f'<td data-layer="{numbers[name]}" title="{escape(name)}" style="{style}">{ranks[name]}</td>'

    headings = [("depth", *panel.columns) if panel.columns else ("layer", "rank")]
    lines = [f"<tr>{''.join(_heading(name, 'col') for name in row)}</tr>" for row in headings]
    for label, row in zip(panel.rows, panel.cells, strict=True):
        lines.append(f"<tr>{_heading(label, 'row')}{''.join(map(cell, row))}</tr>")
    caption = f'<caption style="text-align: left">{escape(panel.stack or "other layers")}</caption>'
    return f"<table>\n{caption}\n{chr(10).join(lines)}\n</table>"


def _heading(text: str, scope: str) -> str:
    return f'<th scope="{scope}" style="text-align: right">{escape(text)}</th>'


def _cells(tag: str, row: Sequence[str]) -> str:
    return "".join(f'<{tag} style="text-align: right">{escape(cell)}</{tag}>' for cell in row)
