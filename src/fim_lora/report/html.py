"""A table for notebooks, as HTML."""

from collections.abc import Sequence
from html import escape


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


def _cells(tag: str, row: Sequence[str]) -> str:
    return "".join(f'<{tag} style="text-align: right">{escape(cell)}</{tag}>' for cell in row)
