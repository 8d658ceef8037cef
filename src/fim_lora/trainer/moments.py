"""`TrainingMoments`: the statistic behind a spectrum, from the passes of a trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..fisher.factors import AdapterMoments, MeasuredLayer
from ..fisher.layers.call import LayerCall
from ..fisher.layers.registry import TargetLayer
from ..fisher.statistic import BatchRows


@dataclass
class TrainingMoments(AdapterMoments):
    """Moments of every adapted layer over micro-batches of a training.

    Attributes:
        sequences_per_example: Sequences that make up one example: 2 in trainers of pairs, otherwise 1.
        loss_scale: Factor of a gradient scaler for float16 on the loss of the present passes.
    """

    sequences_per_example: int = 1
    loss_scale: float = 1.0

    @classmethod
    def for_training(cls, shapes: Mapping[str, tuple[int, int]], sequences_per_example: int = 1) -> TrainingMoments:
        """No moments yet, for layers with these numbers of parts and ranks."""
        empty = AdapterMoments.for_layers(shapes)
        return cls(empty.halves, empty.shapes, sequences_per_example=sequences_per_example)

    def measure(self, layer: TargetLayer, calls: Sequence[LayerCall], rows: BatchRows) -> MeasuredLayer:
        """The moments of one layer in one batch, for the loss before it was scaled."""
        if self.sequences_per_example > 1:
            calls, rows = self._by_example(layer, calls, rows)
        measured = super().measure(layer, calls, rows)
        if self.loss_scale == 1:
            return measured
        moments, scale = measured.moments, self.loss_scale
        unscaled = replace(
            moments,
            inputs=moments.inputs / scale**2 if moments.inputs_have_gradients else moments.inputs,
            gradients=moments.gradients / scale**2,
            core_gradients=moments.core_gradients / scale,
        )
        return measured._replace(moments=unscaled)

    def add(self, measured: Mapping[str, MeasuredLayer], batch_size: int | None, loss: Tensor | None) -> None:
        """Add a batch; see `AdapterMoments.add`. `batch_size` is the number of its sequences."""
        super().add(measured, None if batch_size is None else batch_size // self.sequences_per_example, loss)

    def _by_example(
        self, layer: TargetLayer, calls: Sequence[LayerCall], rows: BatchRows
    ) -> tuple[list[LayerCall], BatchRows]:
        size = rows.batch_size // self.sequences_per_example
        keep_rows = layer.is_run_again
        grouped = [call.grouped_by_example(size, self.sequences_per_example, keep_rows) for call in calls]
        is_attributed = rows.num_groups == rows.batch_size
        groups = size if is_attributed else 1
        return grouped, replace(rows, batch_size=size, num_groups=groups, num_loss_terms=size)
