"""`RowProbe`: finds out which rows of a layer's input belong to which example, where shapes leave several readings.

The batch is run once more, with its examples in another order. The rows that moved are those of the examples. Layers
are compared by one number for each row, a projection of the row on a fixed vector.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..runtime.replay import RandomState
from .gradients.products import MAX_TEMPORARY_BYTES
from .layers.registry import TargetLayer
from .layers.rows import LEADING, Attribution, RowLayout, is_ambiguous, possible_layouts, row_shape
from .orders import copied, has_several_orders, tensors_of, with_next_example

# Largest difference between the rows of the two runs, relative to how far the rows moved. It is far above the
# differences between kernels in bfloat16, and far below those between the rows of two examples.
_TOLERANCE = 0.1

# The same for rows that a layout does not move at all, relative to their size.
_ROUNDING = 1e-6

Projections = list[Tensor]


class Reading(NamedTuple):
    """A layer, and the layouts that fit the shape of its input: what the probe decides about."""

    layer: str
    layouts: tuple[RowLayout, ...]


class _Order(NamedTuple):
    """What one order of the examples says: how rows are attributed, and the loss."""

    attributions: dict[Reading, Attribution]
    loss: Tensor


@dataclass
class RowProbe:
    """Layouts of rows that were found, and the projections of the rows of the current pass.

    Attributes:
        ambiguous: Always empty: the probe decides every layer with several readings.
        found: What is decided.
    """

    ambiguous: ClassVar[Collection[str]] = frozenset()

    found: dict[Reading, Attribution] = field(default_factory=dict)
    # Layers with rows that belonged to no example in some batch, such as those that a router chose.
    _without_examples: set[str] = field(default_factory=set)
    _batch: Any = None
    _random: RandomState = field(default_factory=RandomState.capture)
    _current: dict[Reading, Projections] = field(default_factory=lambda: defaultdict(list))
    _moved: dict[Reading, Projections] | None = None
    _open: set[Reading] = field(default_factory=set)

    @property
    def is_running(self) -> bool:
        """Whether the present forward pass is the one with the examples in another order."""
        return self._moved is not None

    def begin_batch(self, batch: Any, device: torch.device) -> None:
        """A batch begins, for a model on this device. The other order has the same values and random numbers."""
        # Nothing in the batch before it was ambiguous, so its shapes have one reading each.
        self.found.update({key: key.layouts[0] for key in self._current})
        self._clear()
        self._batch = copied(batch)
        self._random = RandomState.capture(torch.empty(0, device=device), *tensors_of(batch))

    def note(self, target: TargetLayer, x: Tensor, batch_size: int) -> None:
        """Note the input of a call in the forward pass."""
        shape = row_shape(x)
        if batch_size == 1:
            return
        key = Reading(target.name, possible_layouts(shape, batch_size, target.batch_dimensions))
        if not key.layouts:
            self._without_examples.add(target.name)
        elif key in self.found:
            return
        elif target.name in self._without_examples and key.layouts != (LEADING,):
            self.found[key] = "none"
        else:
            self._note_rows(key, shape, x, batch_size)

    def _note_rows(self, key: Reading, shape: tuple[int, ...], x: Tensor, batch_size: int) -> None:
        if self._moved is not None:
            self._moved[key].append(projections(x, len(shape)))
            return
        self._current[key].append(projections(x, len(shape)))
        # Ids of one dimension may be positions, which all examples share.
        are_open_ids = not x.is_floating_point() and (len(shape) == 1 or key.layouts != (LEADING,))
        if are_open_ids or is_ambiguous(shape, key.layouts, batch_size):
            self._open.add(key)

    def attribution(self, target: TargetLayer, x: Tensor, batch_size: int) -> Attribution:
        """How the rows of a call are attributed to examples; by rules if nothing had to be decided."""
        key = Reading(target.name, possible_layouts(row_shape(x), batch_size, target.batch_dimensions))
        return self.found.get(key, "by rules")

    def dimensions(self, batch_size: int | None) -> tuple[int, ...]:
        """The dimensions that may hold the examples of the batch: none if nothing in the current pass is open."""
        if not self._open or batch_size is None:
            return ()
        return (0, 1) if has_several_orders(self._batch, batch_size) else (0,)

    @torch.no_grad()
    def decide(
        self,
        run: Callable[[Any], Tensor],
        batch_size: int,
        dimensions: Sequence[int],
        loss: Tensor,
        may_fail: bool,
    ) -> None:
        """Run the batch in another order, and decide about the layers of the current pass.

        If the other order has another loss, the examples were not just reordered: random numbers are drawn for each
        place, or something besides the batch belongs to the examples. Then open readings stay without examples.

        Args:
            run: Function of a batch that runs the forward pass and returns the loss.
            batch_size: Examples in the batch.
            dimensions: From `dimensions`. Processes that run the model together need the same ones.
            loss: The loss of the batch in its own order.
            may_fail: Whether an order that the model refuses, such as lengths that have to be sorted, says nothing.
                Otherwise the exception is raised.
        """
        orders = [self._try_order(run, batch_size, dimension, may_fail) for dimension in dimensions]
        if not bool(loss.isfinite().all()):
            self._clear()  # the batch will be left out, so a later one decides
            return
        best = _best([order for order in orders if order is not None and _is_same(order.loss, loss)])
        for key in self._current:
            answers = {order.attributions[key] for order in best}
            if not best and len(key.layouts) == 1 and key not in self._open:
                answers = {key.layouts[0]}
            self.found[key] = answers.pop() if len(answers) == 1 else "none"
            if self.found[key] == "none":
                self._without_examples.add(key.layer)
        self._clear()

    def _try_order(
        self, run: Callable[[Any], Tensor], batch_size: int, dimension: int, may_fail: bool
    ) -> _Order | None:
        moved: dict[Reading, Projections] = defaultdict(list)
        try:
            with self._another_order(moved):
                loss = run(with_next_example(self._batch, batch_size, dimension))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:
            if not may_fail:
                raise
            return None
        found = {
            key: fitting_layout(before, moved.get(key, []), key.layouts, batch_size)
            for key, before in self._current.items()
        }
        return _Order(found, loss)

    @contextmanager
    def _another_order(self, moved: dict[Reading, Projections]) -> Iterator[None]:
        self._moved = moved
        try:
            with self._random.restored():
                yield
        finally:
            self._moved = None

    def _clear(self) -> None:
        self._current.clear()
        self._open.clear()
        self._batch = None


def projections(x: Tensor, num_positions: int) -> Tensor:
    """One number for each row, in the first one or two dimensions of the rows, in float32 or float64."""
    rows = x.detach() if x.is_floating_point() else x.detach()[..., None]
    rows = rows.flatten(min(num_positions, 2))
    leading, dtype = rows.shape[:-1], torch.float64 if x.dtype == torch.float64 else torch.float32
    places = torch.arange(rows.shape[-1], dtype=torch.float64)  # on the host, because not every device has float64
    vector = (places * places + 1).sin().to(rows.device, dtype)
    flat = rows.reshape(-1, rows.shape[-1])
    size = max(MAX_TEMPORARY_BYTES // (dtype.itemsize * max(flat.shape[1], 1)), 1)
    with torch.autocast(rows.device.type, enabled=False):
        return torch.cat([part.to(dtype) @ vector for part in flat.split(size)]).view(leading)


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
        The layout, or "none" if none fits, or several do.
    """
    if [one.shape for one in before] != [one.shape for one in after]:
        return "none"
    rounding = _ROUNDING * _distance(before, [torch.zeros_like(rows) for rows in before])
    fitting = []
    for layout in layouts:
        expected = [_next_example(rows, layout, batch_size) for rows in before]
        # Relative to its own movement: with smooth rows, such as positions, another layout moves them much farther.
        if _distance(after, expected) <= _TOLERANCE * _distance(before, expected) + rounding:
            fitting.append(layout)
    return fitting[0] if len(fitting) == 1 else "none"


def _is_same(loss: Tensor, other: Tensor) -> bool:
    """Whether two losses are equal, but for the order of sums."""
    tolerance = max(1e-3, 4 * torch.finfo(other.dtype).eps)
    return bool((loss - other).abs() <= tolerance * other.abs())


def _best(orders: Sequence[_Order]) -> list[_Order]:
    """The orders that explain the rows of most layers."""
    explained = [sum(one != "none" for one in order.attributions.values()) for order in orders]
    return [order for order, number in zip(orders, explained, strict=True) if number == max(explained)]


def _next_example(rows: Tensor, layout: RowLayout, batch_size: int) -> Tensor:
    rows = rows.movedim(layout.dimension, 0)
    if layout.is_stacked:
        moved = rows.unflatten(0, (-1, batch_size)).roll(-1, 1)
    else:
        moved = rows.unflatten(0, (batch_size, -1)).roll(-1, 0)
    return moved.flatten(0, 1).movedim(0, layout.dimension)


def _distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    squares = [(one - other).square().sum() for one, other in zip(first, second, strict=True)]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0
