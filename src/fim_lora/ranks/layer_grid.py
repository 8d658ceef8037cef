"""Layer names as grids: depth as rows, kinds of layer as columns, one grid for each stack of the model."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# The names that `nn.ModuleList` gives its modules; two different names are never the same number.
_DEPTH = re.compile("0|[1-9][0-9]{0,8}")

# Enough for a thousand blocks of two hundred layers. Malicious names can need a row and a column each.
_MAX_CELLS = 200_000


@dataclass
class LayerGrid:
    """One stack of layers, such as the encoder: depths label the rows, kinds of layer the columns.

    `stack` is the part of the layer names before the depth; it may be empty. Depth `None` is the row of layers without
    a depth. `cells` has the name of the layer at each depth and kind.
    """

    stack: str
    depths: list[int | None] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    cells: dict[tuple[int | None, str], str] = field(default_factory=dict)


def layer_grids(names: Mapping[str, object]) -> list[LayerGrid]:
    """Sort layer names into grids, by the first number among their dotted parts.

    `model.layers.3.self_attn.q_proj` is in stack `model.layers`, row 3, column `q_proj`. A column is labeled with the
    shortest end of the name that no other column of its stack has and that is not a number. Layers without a number in
    their name, such as `bert.pooler.dense`, share a grid without a stack and keep their whole name. Grids and columns
    follow the order of `names`. A grid of more than 200,000 cells, which would be nearly all empty, raises ValueError.
    """
    grids: dict[str, LayerGrid] = {}
    for name in names:
        stack, depth, kind = _split(name)
        grid = grids.setdefault(stack, LayerGrid(stack))
        grid.cells[depth, kind] = name
    for grid in grids.values():
        kinds = list(dict.fromkeys(kind for _, kind in grid.cells))
        # Only the whole name identifies a layer without a depth.
        labels = {kind: _shortest_distinct_end(kind, kinds) if grid.stack else kind for kind in kinds}
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
    """Plain-text tables of one value per layer, one table for each stack; `values` maps layer names to values."""
    return "\n\n".join(_format_table(grid, values) for grid in layer_grids(values))


def _format_table(grid: LayerGrid, values: Mapping[str, object]) -> str:
    rows = [["", *grid.kinds]]
    for depth in grid.depths:
        cells = [str(values[grid.cells[depth, kind]]) if (depth, kind) in grid.cells else "" for kind in grid.kinds]
        rows.append(["" if depth is None else str(depth), *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(([grid.stack] if grid.stack else []) + lines)


def _split(name: str) -> tuple[str, int | None, str]:
    """Stack, depth and kind of a layer."""
    parts = name.split(".")
    for position, part in enumerate(parts[:-1]):
        if _DEPTH.fullmatch(part):
            return ".".join(parts[:position]), int(part), ".".join(parts[position + 1 :])
    return "", None, name


def _shortest_distinct_end(kind: str, kinds: list[str]) -> str:
    parts = kind.split(".")
    ends = (".".join(parts[first:]) for first in reversed(range(len(parts))))
    # A number alone, as in `downsample.0`, tells nothing about the layer.
    ends = (end for end in ends if not end.isdigit())
    others = [other for other in kinds if other != kind]
    return next((end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)), kind)
