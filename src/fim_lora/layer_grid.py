"""Layer names as a grid: depth as rows, kinds of layer as columns, one grid for each stack of the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# What `nn.ModuleList` calls its modules; two of them are never one number.
_DEPTH = re.compile("0|[1-9][0-9]{0,8}")
# A model of a thousand blocks of two hundred layers. Names made to fill memory can be a row and a column each.
_MAX_CELLS = 200_000


@dataclass
class LayerGrid:
    """One stack of layers, such as the encoder.

    Attributes:
        stack: Name of the stack, the part of the layer names before the depth; may be empty.
        depths: Row labels; `None` is the row of layers that have no depth.
        kinds: Column labels.
        cells: Row and column label to layer name.
    """

    stack: str
    depths: list[int | None] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    cells: dict[tuple[int | None, str], str] = field(default_factory=dict)


def layer_grids(names: Mapping[str, object]) -> list[LayerGrid]:
    """Sort layer names into grids, by the first number among their dotted parts.

    `model.layers.3.self_attn.q_proj` is in stack `model.layers`, row 3, column `q_proj`. Columns carry the shortest
    end of the name that tells them apart from the other columns of their stack. Layers without a number in their
    name, such as `bert.pooler.dense`, share a grid without a stack and keep their whole name.

    Args:
        names: Layer names; the order of kinds follows them.

    Returns:
        The grids, in the order in which their stacks appear.

    Raises:
        ValueError: If a grid would have more than 200,000 cells, nearly all of them empty.
    """
    grids: dict[str, LayerGrid] = {}
    for name in names:
        stack, depth, kind = _split(name)
        grid = grids.setdefault(stack, LayerGrid(stack))
        grid.cells[depth, kind] = name
    for grid in grids.values():
        kinds = list(dict.fromkeys(kind for _, kind in grid.cells))
        # Layers without a depth have nothing else to say where they are.
        labels = _shortest_distinct_ends(kinds) if grid.stack else dict(zip(kinds, kinds, strict=True))
        grid.kinds = list(labels.values())
        grid.cells = {(depth, labels[kind]): name for (depth, kind), name in grid.cells.items()}
        depths = {depth for depth, _ in grid.cells}
        grid.depths = sorted(depths, key=lambda depth: -1 if depth is None else depth)
        if len(grid.depths) * len(grid.kinds) > _MAX_CELLS:
            raise ValueError(
                f"The layers of {grid.stack!r} would make a table of {len(grid.depths)} × {len(grid.kinds)} cells, "
                "too large to show: export the allocation as csv."
            )
    return list(grids.values())


def format_grid(values: Mapping[str, object]) -> str:
    """Tables of one value per layer, as plain text.

    Args:
        values: Layer name to what stands in its cell.

    Returns:
        Lines of text, one table for each stack.
    """
    return "\n\n".join(_format(grid, values) for grid in layer_grids(values))


def _format(grid: LayerGrid, values: Mapping[str, object]) -> str:
    rows = [["", *grid.kinds]]
    for depth in grid.depths:
        cells = [str(values[grid.cells[depth, kind]]) if (depth, kind) in grid.cells else "" for kind in grid.kinds]
        rows.append(["" if depth is None else str(depth), *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(([grid.stack] if grid.stack else []) + lines)


def _split(name: str) -> tuple[str, int | None, str]:
    parts = name.split(".")
    for position, part in enumerate(parts[:-1]):
        if _DEPTH.fullmatch(part):
            return ".".join(parts[:position]), int(part), ".".join(parts[position + 1 :])
    return "", None, name


def _shortest_distinct_ends(kinds: list[str]) -> dict[str, str]:
    return {kind: _shortest_distinct_end(kind, kinds) for kind in kinds}


def _shortest_distinct_end(kind: str, kinds: list[str]) -> str:
    parts = kind.split(".")
    ends = (".".join(parts[first:]) for first in reversed(range(len(parts))))
    others = [other for other in kinds if other != kind]
    return next((end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)), kind)
