"""`RowRules`: attributes rows to examples by the shapes alone, where a pass cannot be repeated."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor

from .layers.registry import TargetLayer
from .layers.rows import (
    LEADING,
    SEQUENCE_FIRST,
    STACKED,
    Attribution,
    RowLayout,
    is_ambiguous,
    possible_layouts,
    row_shape,
)

RowOrder = Literal["consecutive", "stacked", "sequence-first"]
"""How the rows of a layer follow each other where their shape does not show it; see `calibration_batch`."""

ROW_ORDERS: tuple[str, ...] = get_args(RowOrder)

_LAYOUTS: dict[RowOrder, RowLayout] = {
    "consecutive": LEADING,
    "stacked": STACKED,
    "sequence-first": SEQUENCE_FIRST,
}


@dataclass
class RowRules:
    """Attribution by the rules of `by_example`, or as declared.

    Attributes:
        declared: What the user said about the current pass.
        ambiguous: Layers with rows that the rules attributed, although their shape has several readings.
    """

    declared: RowOrder | None = None
    ambiguous: set[str] = field(default_factory=set)

    def note(self, target: TargetLayer, x: Tensor, batch_size: int) -> None:
        """Note the input of a call in the forward pass."""
        if self.declared is not None:
            return
        shape = row_shape(x)
        layouts = possible_layouts(shape, batch_size, target.batch_dimensions)
        if is_ambiguous(shape, layouts, batch_size):
            self.ambiguous.add(target.name)

    def attribution(self, target: TargetLayer, x: Tensor, batch_size: int) -> Attribution:
        """How the rows of a call are attributed to examples."""
        if self.declared is None:
            return "by rules"
        layouts = possible_layouts(row_shape(x), batch_size, target.batch_dimensions)
        layout = _LAYOUTS[self.declared]
        if layout in layouts:
            return layout
        return "by rules" if len(layouts) <= 1 else "none"
