"""`Statistic`: what is measured on the calls of the target layers, and how measurements add up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor
from typing_extensions import Self

from .layers.call import LayerCall
from .layers.registry import TargetLayer

Measurement = TypeVar("Measurement")
Result = TypeVar("Result", covariant=True)


@dataclass(frozen=True)
class BatchRows:
    """How the rows of a layer's calls divide into the examples of a batch.

    Attributes:
        batch_size: Examples in the batch, B. The back-propagated loss is the mean of their losses.
        num_groups: Groups of rows to measure: B, or 1 if the rows cannot be attributed to examples and the whole
            batch counts as one example.
        batch_index: Number of the batch in this process, from 0.
        process: Number of this process.
        num_loss_terms: Terms that the back-propagated loss is the mean of: tokens with a label for a language model,
            B for a classifier, and B if it is not known.
        counts: Whether the pass is a calibration batch. With FSDP and ZeRO-3 a process that has run out of batches
            runs those of others, and `add` is not called for them.
        loss: The loss (1), if it is known before the backward pass.
    """

    batch_size: int
    num_groups: int
    batch_index: int
    process: int
    num_loss_terms: int
    counts: bool = True
    loss: Tensor | None = None


class Statistic(Protocol[Measurement, Result]):
    """A quantity that a `Recorder` collects from layer calls, batch by batch.

    `measure` runs inside the backward pass, so it should leave its result on the layer's device. `add` runs once a
    batch. A statistic is picklable, because processes exchange it to `merge`.
    """

    def measure(self, layer: TargetLayer, calls: Sequence[LayerCall], rows: BatchRows) -> Measurement:
        """Measure one layer in one batch, from its calls, each with its input x and the gradient g of its output.

        Raises `UnattributableError` if rows do not belong to single examples. The recorder then measures again with
        one group.
        """

    def add(self, measured: Mapping[str, Measurement], batch_size: int | None, loss: Tensor | None) -> None:
        """Add a finished batch, with its number of examples and its loss (1) if they are known.

        `measured` maps layer names to measurements. A layer that is missing received no gradient.
        """

    def merge(self, others: Sequence[Self]) -> Self:
        """Return the statistic over the examples of all processes; `self` is that of process 0."""

    def result(self, layers: Mapping[str, TargetLayer]) -> Result:
        """Return the result over all batches, by layer name."""
