"""`RowRules`: attributes rows to examples by the shapes alone, where a pass cannot be repeated."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .layers.registry import TargetLayer
from .layers.rows import Attribution, is_ambiguous, possible_layouts, row_shape


@dataclass
class RowRules:
    """Attribution by the rules of `by_example`.

    Attributes:
        ambiguous: Layers with rows that the rules attributed, although their shape has several readings.
    """

    ambiguous: set[str] = field(default_factory=set)

    def note(self, target: TargetLayer, x: Tensor, batch_size: int) -> None:
        """Note the input of a call in the forward pass."""
        shape = row_shape(x)
        layouts = possible_layouts(shape, batch_size, target.batch_dimensions)
        if x.is_floating_point() and _is_refused_by_the_rules(shape, batch_size, target.batch_dimensions):
            return  # the whole batch counts as one example, which another warning says
        if is_ambiguous(shape, layouts, batch_size) or _may_be_positions(x, batch_size):
            self.ambiguous.add(target.name)

    def attribution(self, target: TargetLayer, x: Tensor, batch_size: int) -> Attribution:
        """How the rows of a call are attributed to examples."""
        return "by rules"


def _is_refused_by_the_rules(shape: Sequence[int], batch_size: int, dimensions: Collection[int]) -> bool:
    """Whether sequences that come first are a multiple of the batch long; see `by_example`."""
    if len(shape) < 2 or 1 not in dimensions or 0 not in dimensions:
        return False
    return shape[0] != batch_size and shape[0] % batch_size == 0 and shape[1] == batch_size


def _may_be_positions(x: Tensor, batch_size: int) -> bool:
    """Whether ids are 0, 1, 2, …, as those of positions, which all examples share."""
    if x.is_floating_point() or x.ndim != 1 or len(x) != batch_size or batch_size == 1:
        return False
    return torch.equal(x, torch.arange(len(x), dtype=x.dtype, device=x.device))
