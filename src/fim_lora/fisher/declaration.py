"""`Declaration`: what the user says about a batch of a loop of one's own, and the calls of a layer divided by it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .layers.attribution import UnattributableError
from .layers.call import LayerCall
from .layers.registry import TargetLayer
from .layers.rows import (
    LEADING,
    SEQUENCE_FIRST,
    STACKED,
    Attribution,
    RowLayout,
    possible_layouts,
    row_shape,
    with_examples_first,
)

RowOrder = Literal["consecutive", "stacked", "sequence-first"]
"""How the rows of a layer follow each other where there are several for each example; see `calibration_batch`."""

ROW_ORDERS: tuple[str, ...] = get_args(RowOrder)

_LAYOUTS: dict[RowOrder, RowLayout] = {"consecutive": LEADING, "stacked": STACKED, "sequence-first": SEQUENCE_FIRST}


class Declaration(NamedTuple):
    """The number of examples of a batch, and how rows follow each other; see `calibration_batch`."""

    num_examples: int
    rows: RowOrder

    def by_example(
        self, layer: TargetLayer, calls: Sequence[LayerCall], forward_sizes: Sequence[int | None]
    ) -> list[LayerCall]:
        """The calls of a layer with the rows of each example together.

        Args:
            layer: The layer.
            calls: Its calls in one batch.
            forward_sizes: For each forward pass of the model, the number of its rows; `None` if it is not known.

        Raises:
            UnattributableError: If the rows of the layer belong to no example.
            ValueError: If the forward passes fit no reading of the declaration.
        """
        examples, sizes = self.num_examples, [self.num_examples if size is None else size for size in forward_sizes]
        if all(size == examples for size in sizes):
            return [self._with_examples_first(layer, call) for call in calls]
        if len(sizes) > 1 and sum(sizes) == examples:
            return [_joined(layer, calls, sizes)]
        several, rest = divmod(sizes[0], examples)
        if rest or len(set(sizes)) > 1 or several == 0 or self.rows == "sequence-first":
            raise ValueError(
                f"calibration_batch was told of {examples} examples with rows={self.rows!r}, but the model was called "
                f"with {', '.join(map(str, sizes))} rows. Give the number of examples over which the loss is a mean."
            )
        if self.rows == "consecutive":
            return list(calls)
        return [call.grouped_by_example(examples, several, layer.is_run_again) for call in calls]

    def _with_examples_first(self, layer: TargetLayer, call: LayerCall) -> LayerCall:
        layouts = possible_layouts(row_shape(call.input), self.num_examples, layer.batch_dimensions)
        layout = _LAYOUTS[self.rows]
        rows: Attribution = layout if layout in layouts else "by rules" if len(layouts) <= 1 else "none"
        return with_examples_first(call, rows, self.num_examples, layer.is_run_again)


def _joined(layer: TargetLayer, calls: Sequence[LayerCall], sizes: Sequence[int]) -> LayerCall:
    """One call in the place of those of a model that was called with one piece of the batch after another."""
    by_rows = sorted(calls, key=lambda call: _num_rows(call.input))
    if layer.is_run_again or len(calls) != len(sizes):
        raise UnattributableError
    pairs = [
        [_with_leading(value, size) for value in (call.input, call.gradient)]
        for call, size in zip(by_rows, sorted(sizes), strict=True)
    ]
    inputs, gradients = zip(*pairs, strict=True)
    if any(one.shape[1:] != inputs[0].shape[1:] for one in inputs):
        raise UnattributableError
    return replace(calls[0], args=(torch.cat(inputs),), gradients=(torch.cat(gradients),))


def _num_rows(x: Tensor) -> int:
    return len(x) if x.ndim else 0


def _with_leading(value: Tensor, size: int) -> Tensor:
    if _num_rows(value) == 0 or len(value) % size:
        raise UnattributableError
    return value if len(value) == size else value.unflatten(0, (size, -1))
