"""Where the examples of a batch are among the rows of the input of a layer, and the calls with examples first."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_map

from .attribution import UnattributableError
from .call import LayerCall


class RowLayout(NamedTuple):
    """One way in which rows belong to examples.

    Attributes:
        dimension: The dimension of the input that holds the examples: 0, or 1 if the sequence comes first.
        is_stacked: How k rows of each of B examples follow each other in that dimension: rows t, t + B, … belong to
            example t, as after `torch.cat` of several inputs; otherwise k consecutive rows do, as after
            `hidden.view(-1, d)`.
    """

    dimension: int
    is_stacked: bool = False


Attribution = RowLayout | Literal["by rules", "none"]
"""How rows are attributed to examples: in a known layout, by the rules of `attribution`, or to none."""

LEADING = RowLayout(0)
STACKED = RowLayout(0, is_stacked=True)
SEQUENCE_FIRST = RowLayout(1)


def row_shape(x: Tensor) -> tuple[int, ...]:
    """The dimensions of the input of a layer that may hold examples: all but the features, which ids do not have."""
    return tuple(x.shape[:-1]) if x.is_floating_point() else tuple(x.shape)


def possible_layouts(
    shape: Sequence[int], batch_size: int, dimensions: Collection[int] = (0, 1)
) -> tuple[RowLayout, ...]:
    """All layouts that fit the leading dimensions of an input.

    A leading dimension of the size of the batch is the batch, unless the second one has this size as well.

    Args:
        shape: From `row_shape`.
        batch_size: Examples in the batch, B.
        dimensions: Those that may hold the examples in this type of layer.
    """
    sizes = [shape[dimension] if dimension in dimensions else 0 for dimension in range(min(len(shape), 2))]
    if sizes and sizes[0] == batch_size and batch_size not in sizes[1:]:
        return (LEADING,)
    found = []
    for dimension, size in enumerate(sizes):
        if size and size % batch_size == 0:
            found.append(RowLayout(dimension))
            if size > batch_size:
                found.append(RowLayout(dimension, is_stacked=True))
    return tuple(found)


def is_ambiguous(shape: Sequence[int], layouts: Sequence[RowLayout], batch_size: int) -> bool:
    """Whether the shape of an input leaves several readings.

    One is that no row belongs to a single example: rows that a router chose, or positions that all examples share,
    such as 1 × T with T = B.
    """
    if batch_size == 1 or not layouts or layouts == (LEADING,):
        return False
    return layouts != (SEQUENCE_FIRST,) or shape[0] == 1


def with_examples_first(call: LayerCall, rows: Attribution, batch_size: int, keep_rows: bool) -> LayerCall:
    """The call with tensors B × k × …, or (B · k) × … with `keep_rows`, for a layer that is run again.

    Raises `UnattributableError` if rows belong to no example, or if the examples of a layer that is run again are
    stacked in the second dimension.
    """
    if rows == "by rules":
        return call
    if rows == "none":
        raise UnattributableError
    layout = rows
    if keep_rows and layout.dimension == 1:
        # The layer itself knows which dimension is the batch.
        if layout.is_stacked:
            raise UnattributableError
        return call
    if layout.is_stacked and layout.dimension == 0:
        return call.grouped_by_example(batch_size, call.input.shape[0] // batch_size, keep_rows)
    if keep_rows:
        return call

    def arranged(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim <= layout.dimension:
            return value
        value = value.movedim(layout.dimension, 0)
        if layout.is_stacked:
            return value.unflatten(0, (-1, batch_size)).transpose(0, 1)
        return value if value.shape[0] == batch_size else value.unflatten(0, (batch_size, -1))

    args, gradients = tree_map(arranged, (call.args, call.gradients))
    return replace(call, args=args, gradients=gradients)
