"""The panels of a rank map: one table of layers for each stack, or a list of layers without a depth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..ranks.layer_grid import LayerGrid, layer_grids


@dataclass(frozen=True)
class Panel:
    """One table of layers.

    Attributes:
        stack: The part of the layer names before the depth; empty for layers without a depth.
        rows: A depth such as `"3"`, depths such as `"4–5"`, or the names of layers without a depth.
        columns: Kinds of layer; empty for a list of names.
        cells: The layers of every cell, by row and column: none, or one for each depth that has such a layer.
        depths_per_row: Depths of one row.
    """

    stack: str
    rows: list[str]
    columns: list[str]
    cells: list[list[list[str]]]
    depths_per_row: int = 1

    @property
    def has_empty_cells(self) -> bool:
        """Whether a row has no layer of some kind."""
        return any(not names for row in self.cells for names in row)

    def means(self, ranks: Mapping[str, int]) -> npt.NDArray[np.float64]:
        """The mean rank of every cell (rows × columns); NaN where there is no layer."""
        return np.array(
            [[np.mean([ranks[name] for name in names]) if names else np.nan for names in row] for row in self.cells]
        )


def rank_panels(names: Mapping[str, object], max_rows: int | None = None) -> list[Panel]:
    """The panels of all layers. Stacks of more depths than `max_rows` have several depths in a row.

    Raises `ValueError` if there are no layers, or if a table of their names is too large.
    """
    grids = layer_grids(names)
    if not grids:
        raise ValueError("There is nothing to draw: there are no layers.")
    panels = []
    for grid in grids:
        depths = [depth for depth in grid.depths if depth is not None]
        if depths:
            panels.append(_table(grid, depths, max_rows))
        if len(depths) < len(grid.depths):
            panels.append(_list(grid))
    return panels


def _table(grid: LayerGrid, depths: Sequence[int], max_rows: int | None) -> Panel:
    kinds = [kind for kind in grid.kinds if any((depth, kind) in grid.cells for depth in depths)]
    per_row = 1 if max_rows is None else -(-len(depths) // max_rows)
    groups = [depths[first : first + per_row] for first in range(0, len(depths), per_row)]
    rows = [str(group[0]) if len(group) == 1 else f"{group[0]}–{group[-1]}" for group in groups]
    cells = [
        [[grid.cells[depth, kind] for depth in group if (depth, kind) in grid.cells] for kind in kinds]
        for group in groups
    ]
    return Panel(grid.stack, rows, kinds, cells, per_row)


def _list(grid: LayerGrid) -> Panel:
    """The layers without a depth. One row for each needs less room than a column, because their names are long."""
    names = [name for (depth, _), name in grid.cells.items() if depth is None]
    return Panel(grid.stack, names, [], [[[name]] for name in names])
