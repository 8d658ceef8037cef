"""`RowRules`: attributes rows to examples by the shapes alone, where a pass cannot be repeated."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .layers.attribution import rules_contradict
from .layers.registry import TargetLayer
from .layers.rows import Attribution, is_ambiguous, possible_layouts, row_shape


@dataclass
class RowRules:
    """Attribution by the rules of `by_example`.

    Attributes:
        is_running: Always `False`: the rules run no further pass.
        ambiguous: Layers with rows that the rules attributed, although their shape has several readings.
    """

    is_running: ClassVar[bool] = False

    ambiguous: set[str] = field(default_factory=set)

    def note(self, target: TargetLayer, x: Tensor, batch_size: int) -> None:
        """Note the input of a call in the forward pass."""
        shape = row_shape(x)
        layouts = possible_layouts(shape, batch_size, target.batch_dimensions)
        follows_rules = x.is_floating_point() and target.batch_dimensions == (0, 1)
        if follows_rules and rules_contradict(shape, batch_size):
            return  # the whole batch counts as one example, which another warning says
        if is_ambiguous(shape, layouts, batch_size) or _may_be_positions(x, batch_size):
            self.ambiguous.add(target.name)

    def attribution(self, target: TargetLayer, x: Tensor, batch_size: int) -> Attribution:
        """How the rows of a call are attributed to examples."""
        return "by rules"


def _may_be_positions(x: Tensor, batch_size: int) -> bool:
    """Whether ids are 0, 1, 2, …, as those of positions, which all examples share."""
    if x.is_floating_point() or x.ndim != 1 or len(x) != batch_size or batch_size == 1:
        return False
    return torch.equal(x, torch.arange(len(x), dtype=x.dtype, device=x.device))
