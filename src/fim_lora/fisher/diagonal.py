"""`DiagonalSums`: the statistic behind the eFIM diagonals, squared per-example gradients of every element."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from ..runtime.distributed import gather_from_all, num_processes
from .coverage import (
    CAUSES_OF_NO_GRADIENT,
    NO_BATCH_SEEN,
    warn_of_skipped_batches,
    warn_of_unattributed_layers,
    warn_of_unreached_layers,
)
from .fim_diagonals import FimDiagonals
from .gradients.products import MAX_TEMPORARY_BYTES, compute_dtype, slices
from .layers.call import LayerCall
from .layers.entries_registry import EntriesType, entries_type
from .layers.registry import TargetLayer
from .statistic import BatchRows


@dataclass
class DiagonalCounts:
    """What is known about a calibration besides its sums.

    Attributes:
        num_examples: Layer name to the examples that its sum is over.
        num_batches: Batches seen.
        num_skipped_batches: Batches left out, for some layers or for all, because the loss or a gradient was not
            finite.
        reached: Layers that took part in a loss.
        unattributed: Layers whose rows could not be attributed to examples in some batch.
        incomplete: Layers that do not have all batches that other layers have.
    """

    num_examples: dict[str, int]
    num_batches: int = 0
    num_skipped_batches: int = 0
    reached: set[str] = field(default_factory=set)
    unattributed: set[str] = field(default_factory=set)
    incomplete: set[str] = field(default_factory=set)

    @classmethod
    def merged(cls, several: Sequence[DiagonalCounts]) -> DiagonalCounts:
        """The counts over all processes. Raises `RuntimeError` if the layers differ."""
        for process, other in enumerate(several):
            different = sorted(set(several[0].num_examples) ^ set(other.num_examples))
            if different:
                raise RuntimeError(
                    f"Process {process} measures other layers than process 0, for example {different[0]!r}: every "
                    "process needs the same model and the same `parameters`."
                )
        return cls(
            {name: sum(one.num_examples[name] for one in several) for name in several[0].num_examples},
            sum(one.num_batches for one in several),
            sum(one.num_skipped_batches for one in several),
            set().union(*(one.reached for one in several)),
            set().union(*(one.unattributed for one in several)),
            set().union(*(one.incomplete for one in several)),
        )


class DiagonalSums:
    """Running sums of `G_t ∘ G_t`, one tensor of the shape of the weight for each layer. A `Statistic`.

    A second copy of every weight would be needed to hold a batch back until all of its gradients are known to be
    finite. So `measure` adds to the sum at once, if the loss is finite. In a batch in which a gradient is not finite,
    the layers up to there, from the output of the model on, have been added; all others are left out.

    The result is what `mean` divides by. Processes exchange only the counts when they merge, because the sums are as
    large as the model; `mean` adds them up.

    Args:
        layers: Name to target layer, of a layer type that has an `EntriesType`.
        device: Where the sums are kept; `None` for the device of each layer.
    """

    def __init__(self, layers: Mapping[str, TargetLayer], device: torch.device | None = None) -> None:
        self.counts = DiagonalCounts(dict.fromkeys(layers, 0))
        self.sums: dict[str, Tensor] = {}
        self.device = device
        self._is_finite = True  # so far in the current batch

    def measure(self, layer: TargetLayer, calls: Sequence[LayerCall], rows: BatchRows) -> int:
        """Add one layer's share of the current batch to its sum, and return the number of examples: 0 if it is not."""
        if not rows.counts:
            return 0
        has_finite_loss = rows.loss is None or bool(rows.loss.isfinite().all())
        if not self._is_finite or not has_finite_loss or not all(_is_finite(call) for call in calls):
            self._is_finite = False  # gradients further down the backward pass come from this one
            return 0
        if layer.name not in self.sums:
            self.sums[layer.name] = self._zeros(layer, calls[0].gradient)
        # G_t = B · g_tᵀ x_t, because the loss is the mean over examples of ℓ_t. If the whole batch is one group, every
        # example gets (Σ_t G_t)² / B, as in `NormSums.measure`, and the sum over examples has the same factor.
        add = _entries_type(layer).add_squared_entries
        add(self.sums[layer.name], layer, calls, rows.num_groups, float(rows.batch_size**2))
        if rows.num_groups != rows.batch_size:
            self.counts.unattributed.add(layer.name)
        return rows.batch_size

    def add(self, measured: Mapping[str, int], batch_size: int | None, loss: Tensor | None) -> None:
        """Count a finished batch, for every layer but those whose gradients were not finite."""
        is_usable = loss is None or bool(loss.isfinite().all())
        left_out = {name for name, size in measured.items() if size == 0}
        self._is_finite = True
        self.counts.num_batches += 1
        if not is_usable or left_out:
            self.counts.num_skipped_batches += 1
        if not is_usable or (measured and len(left_out) == len(measured)):
            return
        self.counts.reached.update(set(measured) - left_out)
        self.counts.incomplete.update(left_out)
        size = batch_size or max(measured.values(), default=1)
        for name in self.counts.num_examples.keys() - left_out:
            self.counts.num_examples[name] += size

    def merge(self, others: Sequence[DiagonalSums]) -> DiagonalSums:
        """The counts over the examples of all processes, without sums.

        Raises:
            RuntimeError: If the layers differ.
        """
        merged = DiagonalSums({}, self.device)
        merged.counts = DiagonalCounts.merged([self.counts, *(other.counts for other in others)])
        return merged

    def result(self, layers: Mapping[str, TargetLayer]) -> DiagonalCounts:
        """The counts, with warnings about what the user can act on.

        Raises:
            RuntimeError: If no batch was seen, or a layer had no batch with finite gradients.
        """
        counts = self.counts
        if counts.num_batches == 0:
            raise RuntimeError(NO_BATCH_SEEN)
        empty = [name for name in layers if counts.num_examples[name] == 0]
        if empty:
            raise RuntimeError(
                f"All {counts.num_batches} calibration batches had a loss or gradients that are not finite, in "
                f"{len(empty)} of {len(layers)} layers, for example {empty[0]!r}: calibrate in bfloat16 or float32, "
                "scale the loss down, or look for NaN and for batches without labels in the data."
            )
        _warn(counts, layers)
        return counts

    def mean(self, counts: DiagonalCounts, layers: Mapping[str, TargetLayer]) -> FimDiagonals:
        """The diagonals: the sums of all processes divided by the numbers of examples. It uses the sums up.

        Every process has to call this, with the result for all of them.

        Raises:
            RuntimeError: If a sum is not finite, all of them are zero, or another process failed.
        """
        diagonals = {}
        for name, layer in layers.items():
            total = self.sums.pop(name, None)
            total = _over_processes(self._zeros(layer) if total is None else total)
            diagonals[name] = total.div_(counts.num_examples[name])
            if not bool(total.amax().isfinite()):
                raise RuntimeError(
                    f"The eFIM of layer {name!r} is larger than {total.dtype} can hold: scale the loss down, or "
                    "calibrate in float64."
                )
        if not any(bool(diagonal.any()) for diagonal in diagonals.values()):
            raise RuntimeError(f"The eFIM of every layer is exactly zero. {CAUSES_OF_NO_GRADIENT}")
        return FimDiagonals(
            diagonals, counts.num_batches, max(counts.num_examples.values()), counts.num_skipped_batches
        )

    def _zeros(self, layer: TargetLayer, gradient: Tensor | None = None) -> Tensor:
        """A sum of zeros; `None` for a layer that received no gradient in this process."""
        device, dtype = self.device or torch.device("cpu"), torch.float32
        if gradient is not None:
            device, dtype = self.device or gradient.device, compute_dtype(gradient, gradient)
        return torch.zeros(_entries_type(layer).entries_shape(layer), device=device, dtype=dtype)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"sums": {}}


def _entries_type(layer: TargetLayer) -> EntriesType:
    return cast(EntriesType, entries_type(layer))


def _is_finite(call: LayerCall) -> bool:
    return bool(call.input.isfinite().all()) and bool(call.gradient.isfinite().all())


def _over_processes(total: Tensor) -> Tensor:
    """Add up the sums of all processes, some rows at a time, so that no process holds several whole sums."""
    if num_processes() == 1:
        return total
    dtypes = gather_from_all(lambda: total.dtype)  # a process without a gradient does not know the dtype
    total = total.to(torch.float64 if torch.float64 in dtypes else torch.float32)
    for rows in slices(len(total), max(MAX_TEMPORARY_BYTES // total[0].nbytes, 1)):
        # A copy, because a view is pickled together with the whole tensor.
        block, *others = gather_from_all(lambda: total[rows].to("cpu", copy=True))  # noqa: B023  called at once
        for other in others:
            block += other
        total[rows] = block.to(total.device)
    return total


def _warn(counts: DiagonalCounts, layers: Mapping[str, TargetLayer]) -> None:
    where = f" in {len(counts.incomplete)} layers" if counts.incomplete else " in all layers"
    warn_of_skipped_batches(counts.num_batches, counts.num_skipped_batches, where)
    warn_of_unattributed_layers(counts.unattributed, "diagonals", ", and their diagonals are approximate")
    warn_of_unreached_layers(
        layers,
        counts.reached,
        "layers",
        ", and their diagonals are zero",
        "If they never take part in it, leave them out of `parameters`.",
    )
