"""`NormSums`: the statistic behind the scores, squared per-example gradient norms `‖G_t‖²_F`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .coverage import (
    CAUSES_OF_NO_GRADIENT,
    require_usable_batches,
    warn_of_skipped_batches,
    warn_of_unattributed_layers,
    warn_of_unreached_layers,
)
from .gradients.sketch import Sketch
from .layers.call import LayerCall
from .layers.registry import TargetLayer
from .moments import RunningMoments
from .scores import FimScores, LayerScore
from .statistic import BatchRows


class Norms(NamedTuple):
    """Squared norms (B) or (1) on their device, for the back-propagated loss, and the factor to multiply them by."""

    values: Tensor
    factor: int


@dataclass
class NormSums:
    """Running sums over calibration examples: a few numbers per layer. A `Statistic`.

    Attributes:
        moments: Layer name to the moments of `‖G_t‖²_F`.
        exact: Whether long examples are read exactly and not through a random projection; see `FimConfig.exact`.
        num_batches: Batches seen.
        num_skipped_batches: Batches left out, because the loss or a gradient was not finite.
        reached: Layers that took part in a loss.
        unattributed: Layers whose rows could not be attributed to examples in some batch.
        sketched: Layers that were read through a random projection in some batch.
    """

    moments: dict[str, RunningMoments]
    exact: bool = False
    num_batches: int = 0
    num_skipped_batches: int = 0
    reached: set[str] = field(default_factory=set)
    unattributed: set[str] = field(default_factory=set)
    sketched: set[str] = field(default_factory=set)

    @classmethod
    def for_layers(cls, names: Iterable[str], exact: bool = False) -> NormSums:
        """Empty sums for layers of these names."""
        return cls({name: RunningMoments() for name in names}, exact)

    def measure(self, layer: TargetLayer, calls: Sequence[LayerCall], rows: BatchRows) -> Norms:
        """`‖G_t‖²_F` of every example, or of the whole batch as one example."""
        sketch = None if self.exact else Sketch(layer.name, rows.batch_index, rows.process)
        norms = layer.layer_type.squared_norms(
            layer, [replace(call, sketch=sketch) for call in calls], rows.num_groups
        )
        if sketch is not None and sketch.used:
            self.sketched.add(layer.name)
        if rows.num_groups == rows.batch_size:
            # G_t = B · g_tᵀ x_t, because the loss is the mean over examples of ℓ_t.
            return Norms(norms, rows.batch_size**2)
        self.unattributed.add(layer.name)
        # ‖Σ_t G_t‖² / B is Σ_t ‖G_t‖² / B in expectation if the G_t are independent with mean zero.
        return Norms(norms, rows.batch_size)

    def add(self, measured: Mapping[str, Norms], batch_size: int | None, loss: Tensor | None) -> None:
        """Add a batch, with `‖G_t‖²_F` (B) of each layer, or its mean over the examples (1) where rows belong to none.

        A batch in which the loss or a gradient is not finite (overflow in float16) is skipped for all layers.
        """
        self.num_batches += 1
        lengths = [len(norms.values) for norms in measured.values()]
        values = _to_host([*(norms.values for norms in measured.values()), *([] if loss is None else [loss])])
        if not np.isfinite(values).all():
            self.num_skipped_batches += 1
            return
        by_layer = np.split(values, np.cumsum(lengths))
        found = {name: by_layer[place] * measured[name].factor for place, name in enumerate(measured)}
        self.reached.update(found)
        size = batch_size or max(lengths, default=1)
        zeros = np.zeros(size)
        for name, moments in self.moments.items():
            norms = found.get(name, zeros)
            # The weight of a batch is its number of examples, even if it has one value for all of them.
            moments.add(norms, size / len(norms))

    def merge(self, others: Sequence[NormSums]) -> NormSums:
        """The sums over the examples of all processes, as if one process had seen them all.

        Raises:
            RuntimeError: If the layers differ.
        """
        several = [self, *others]
        for process, other in enumerate(several):
            different = sorted(set(self.moments) ^ set(other.moments))
            if different:
                raise RuntimeError(
                    f"Process {process} calibrates other layers than process 0, for example {different[0]!r}: every "
                    "process needs the same model and the same config. Pipeline parallelism is not supported."
                )
        return NormSums(
            {name: RunningMoments.merged(sums.moments[name] for sums in several) for name in self.moments},
            self.exact,
            sum(sums.num_batches for sums in several),
            sum(sums.num_skipped_batches for sums in several),
            set().union(*(sums.reached for sums in several)),
            set().union(*(sums.unattributed for sums in several)),
            set().union(*(sums.sketched for sums in several)),
        )

    def result(self, layers: Mapping[str, TargetLayer]) -> FimScores:
        """The scores, with warnings about what the user can act on.

        Raises:
            RuntimeError: If no batch was seen, no batch had finite gradients, or every score is zero.
        """
        require_usable_batches(self.num_batches, self.num_skipped_batches)
        scores = {name: self._score(name, layer) for name, layer in layers.items()}
        if all(score.mean == 0 for score in scores.values()):
            raise RuntimeError(f"The eFIM of every layer is exactly zero. {CAUSES_OF_NO_GRADIENT}")
        self._warn(layers)
        return FimScores(scores, self.num_batches, self.num_skipped_batches)

    def _score(self, name: str, layer: TargetLayer) -> LayerScore:
        moments, weight = self.moments[name], layer.weight_shape
        error = moments.standard_error
        return LayerScore(
            mean=moments.mean / weight.entries,
            standard_error=None if error is None else error / weight.entries,
            num_examples=moments.count,
            shape=(weight.d_out, weight.d_in),
            parameters_per_rank=weight.parameters_per_rank,
            rank_step=weight.rank_step,
            exact=name not in self.sketched,
            num_entries=weight.num_entries,
        )

    def _warn(self, layers: Mapping[str, TargetLayer]) -> None:
        warn_of_skipped_batches(self.num_batches, self.num_skipped_batches)
        warn_of_unattributed_layers(self.unattributed, "scores", ", and their scores are approximate")
        warn_of_unreached_layers(
            layers,
            self.reached,
            "target layers",
            " and score zero",
            "If they never take part in it, remove them from `target_modules`.",
        )


def _to_host(tensors: Sequence[Tensor]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Concatenate 1-D tensors, with one transfer per device."""
    arrays: list[Any] = [np.zeros(0)] * len(tensors)
    for device in {tensor.device for tensor in tensors}:
        places = [place for place, tensor in enumerate(tensors) if tensor.device == device]
        on_device = [tensors[place] for place in places]
        joined = torch.cat([tensor.float() if tensor.dtype != torch.float64 else tensor for tensor in on_device])
        on_host = joined.cpu().double().numpy()
        lengths = [len(tensor) for tensor in on_device]
        for place, array in zip(places, np.split(on_host, np.cumsum(lengths)[:-1]), strict=True):
            arrays[place] = array
    return np.concatenate(arrays) if arrays else np.zeros(0)
