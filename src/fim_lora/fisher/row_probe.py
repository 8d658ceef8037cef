"""`RowProbe`: finds out which rows of a layer's input belong to which example, where shapes leave several readings.

The batch is run once more, with its examples in another order. The rows that moved are those of the examples. Layers
are compared by one number for each row, a projection of the row on a fixed vector.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..runtime.replay import RandomState
from .layers.registry import TargetLayer
from .layers.rows import LEADING, Attribution, RowLayout, is_ambiguous, possible_layouts, row_shape

# Largest difference between the rows of the two runs, relative to how far the rows moved. It is far above the
# differences between kernels in bfloat16, and far below those between the rows of two examples.
_TOLERANCE = 0.1

# Largest relative difference between the losses of a batch and of the same examples in another order.
_LOSS_TOLERANCE = 1e-3

Projections = list[Tensor]


class Shape(NamedTuple):
    """A layer, and the layouts that fit to the shape of its input: what the probe decides about."""

    layer: str
    layouts: tuple[RowLayout, ...]


class _Order(NamedTuple):
    """What one order of the examples says: the layout of each shape, and the loss."""

    layouts: dict[Shape, Attribution]
    loss: float


@dataclass
class RowProbe:
    """Layouts of rows that were found, and the projections of the rows of the current pass.

    Attributes:
        found: What is decided.
    """

    found: dict[Shape, Attribution] = field(default_factory=dict)
    # Layers with rows that belonged to no example in some batch, such as those that a router chose.
    _without_examples: set[str] = field(default_factory=set)
    _random: RandomState = field(default_factory=RandomState.capture)
    _current: dict[Shape, Projections] = field(default_factory=lambda: defaultdict(list))
    _moved: dict[Shape, Projections] | None = None
    _open: set[Shape] = field(default_factory=set)

    @property
    def is_running(self) -> bool:
        """Whether the present forward pass is the one with the examples in another order."""
        return self._moved is not None

    def dimensions(self, batch: Any, batch_size: int | None) -> tuple[int, ...]:
        """The dimensions that may hold the examples of the batch: none if nothing in the current pass is open.

        There are two if both first dimensions of a tensor have the size of the batch.
        """
        if not self._open:
            return ()
        tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        is_square = any(value.ndim >= 2 and value.shape[0] == value.shape[1] == batch_size for value in tensors)
        return (0, 1) if is_square else (0,)

    def begin_batch(self, batch: Any) -> None:
        """A batch begins. Random numbers of the other order will be those of its forward pass."""
        # Nothing in the batch before it was ambiguous, so its shapes have one reading each.
        self.found.update({key: key.layouts[0] for key in self._current})
        self._current.clear()
        self._open.clear()
        self._random = RandomState.capture(batch)

    def note(self, target: TargetLayer, x: Tensor, batch_size: int) -> None:
        """Note the input of a call in the forward pass."""
        shape = row_shape(x)
        if batch_size == 1:
            return
        key = Shape(target.name, possible_layouts(shape, batch_size, target.batch_dimensions))
        if not key.layouts:
            self._without_examples.add(target.name)
        elif key in self.found:
            return
        elif target.name in self._without_examples and key.layouts != (LEADING,):
            self.found[key] = "none"
        else:
            self._note_rows(key, shape, x, batch_size)

    def _note_rows(self, key: Shape, shape: tuple[int, ...], x: Tensor, batch_size: int) -> None:
        current = self._current if self._moved is None else self._moved
        current[key].append(projections(x, len(shape)))
        # Ids of one dimension may be positions, which all examples share.
        are_open_ids = not x.is_floating_point() and (len(shape) == 1 or key.layouts != (LEADING,))
        if are_open_ids or is_ambiguous(shape, key.layouts, batch_size):
            self._open.add(key)

    def attribution(self, target: TargetLayer, x: Tensor, batch_size: int) -> Attribution:
        """How the rows of a call are attributed to examples; by rules if nothing had to be decided."""
        key = Shape(target.name, possible_layouts(row_shape(x), batch_size, target.batch_dimensions))
        return self.found.get(key, "by rules")

    @torch.no_grad()
    def decide(
        self, run: Callable[[Any], Tensor], batch: Any, batch_size: int, dimensions: Sequence[int], loss: Tensor
    ) -> None:
        """Run the batch in another order, and decide about all shapes of the current pass.

        Args:
            run: Function of a batch that runs the forward pass and returns the loss.
            batch: The batch.
            batch_size: Examples in it.
            dimensions: From `dimensions`. Processes that run the model together need the same ones.
            loss: The loss of the batch in its own order.
        """
        orders = []
        for dimension in dimensions:
            with self._another_order() as moved:
                other = run(with_next_example(batch, batch_size, dimension))
            orders.append(_Order(self._fitting(moved, batch_size), float(other)))
        if len(orders) > 1:
            orders = _best(orders, float(loss))
        for key in self._current:
            answers = {order.layouts[key] for order in orders}
            self.found[key] = answers.pop() if len(answers) == 1 else "none"
            if self.found[key] == "none":
                self._without_examples.add(key.layer)
        self._current.clear()
        self._open.clear()

    @contextmanager
    def _another_order(self) -> Iterator[dict[Shape, Projections]]:
        self._moved = defaultdict(list)
        try:
            with self._random.restored():
                yield self._moved
        finally:
            self._moved = None

    def _fitting(self, moved: Mapping[Shape, Projections], batch_size: int) -> dict[Shape, Attribution]:
        return {
            key: fitting_layout(before, moved.get(key, []), key.layouts, batch_size)
            for key, before in self._current.items()
        }


def projections(x: Tensor, num_positions: int) -> Tensor:
    """One number for each row, in the first one or two dimensions of the rows, in float32 or float64."""
    kept = min(num_positions, 2)
    rows = x.detach()
    rows = rows.double() if not rows.is_floating_point() else rows.float() if rows.dtype.itemsize < 4 else rows
    rows = rows.flatten(kept) if rows.ndim > kept else rows.unsqueeze(-1)
    places = torch.arange(rows.shape[-1], device=rows.device, dtype=torch.float64)
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ (places * places + 1).sin().to(rows.dtype)


def fitting_layout(
    before: Sequence[Tensor], after: Sequence[Tensor], layouts: Sequence[RowLayout], batch_size: int
) -> Attribution:
    """The one layout by which `after` is `before` with every example in the place of the one before it.

    Args:
        before: Projections of the rows of each call.
        after: The same for the other order of the examples.
        layouts: The possible layouts.
        batch_size: Examples in the batch.

    Returns:
        The layout, or "none" if none fits, or several do. A single one stands if all rows are equal.
    """
    if [one.shape for one in before] != [one.shape for one in after]:
        return "none"
    expected = {layout: [_next_example(rows, layout, batch_size) for rows in before] for layout in layouts}
    scale = max(_distance(before, rows) for rows in expected.values())
    if scale <= 1e-6 * _distance(before, [torch.zeros_like(rows) for rows in before]):
        return layouts[0] if len(layouts) == 1 else "none"
    fitting = [layout for layout, rows in expected.items() if _distance(after, rows) <= _TOLERANCE * scale]
    return fitting[0] if len(fitting) == 1 else "none"


def with_next_example(batch: Any, batch_size: int, dimension: int) -> Any:
    """The batch with every example in the place of the one before it.

    Tensors have their examples in `dimension`, or, if only the other one of the first two has the size of the batch,
    in that one; tensors without such a dimension stay.
    """

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        fitting = [place for place in range(min(value.ndim, 2)) if value.shape[place] == batch_size]
        if not fitting:
            return value
        return value.roll(-1, dimension if dimension in fitting else fitting[0])

    return tree_map(moved, batch)


def _best(orders: Sequence[_Order], loss: float) -> list[_Order]:
    """The orders that leave the loss as it was and explain the rows of most layers."""
    same_loss = [order for order in orders if abs(order.loss - loss) <= _LOSS_TOLERANCE * abs(loss)] or list(orders)
    explained = [sum(layout != "none" for layout in order.layouts.values()) for order in same_loss]
    return [order for order, number in zip(same_loss, explained, strict=True) if number == max(explained)]


def _next_example(rows: Tensor, layout: RowLayout, batch_size: int) -> Tensor:
    rows = rows.movedim(layout.dimension, 0)
    if layout.is_stacked:
        moved = rows.unflatten(0, (-1, batch_size)).roll(-1, 1)
    else:
        moved = rows.unflatten(0, (batch_size, -1)).roll(-1, 0)
    return moved.flatten(0, 1).movedim(0, layout.dimension)


def _distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    squares = [(one - other).double().square().sum() for one, other in zip(first, second, strict=True)]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0
