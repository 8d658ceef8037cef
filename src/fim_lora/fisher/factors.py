"""The statistics behind a spectrum: moments of `h = A x` and `u = s · Bᵀ g`, and gradients of the core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..runtime.user_warnings import warn_user
from .coverage import (
    CAUSES_OF_NO_GRADIENT,
    require_usable_batches,
    warn_of_skipped_batches,
    warn_of_unattributed_layers,
    warn_of_unreached_layers,
)
from .layers.call import LayerCall
from .layers.components import AdaptedLayer, ComponentMoments
from .layers.registry import TargetLayer
from .statistic import BatchRows

Array = npt.NDArray[Any]


PATH_SCALE = 0.25
"""The part of the adapter's scaling with which every second calibration batch runs; see `PathMoments`."""


class MeasuredLayer(NamedTuple):
    """The moments of one layer in one batch, on its device; the loss is the mean of `num_loss_terms` terms."""

    moments: ComponentMoments
    num_loss_terms: int


@dataclass
class LayerMoments:
    """Sums over calibration batches for the adapter of one layer, for the summed loss, in float64.

    Attributes:
        inputs: `Σ h hᵀ` over positions (P × r × r).
        gradients: `Σ u uᵀ` over positions (P × r × r).
        core_gradients: `Γ_t` (B × P × r × r), float32, one array for each batch. If the rows of a layer cannot be
            attributed to examples, that of the whole batch stands for its first example and the others are zero: the
            sum of squares is the same in expectation, because the gradients of different examples are independent.
    """

    inputs: Array
    gradients: Array
    core_gradients: list[Array] = field(default_factory=list)

    def __add__(self, other: LayerMoments) -> LayerMoments:
        return LayerMoments(
            self.inputs + other.inputs,
            self.gradients + other.gradients,
            [*self.core_gradients, *other.core_gradients],
        )


@dataclass
class AdapterMoments:
    """Moments of every adapted layer over calibration batches. A `Statistic`.

    Batches go to two halves in turn, so that what they say can be compared.

    Attributes:
        halves: For each half, layer name to its moments.
        shapes: Layer name to the number of parts P and their rank r.
        batch_sizes: For each half, the number of examples of each batch.
        num_loss_terms: Terms of the loss in all batches that were used.
        num_batches: Batches seen.
        num_skipped_batches: Batches left out, because the loss or a gradient was not finite.
        reached: Layers that took part in a loss.
        unattributed: Layers whose rows could not be attributed to examples in some batch.
    """

    halves: tuple[dict[str, LayerMoments], dict[str, LayerMoments]]
    shapes: dict[str, tuple[int, int]]
    batch_sizes: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))
    num_loss_terms: int = 0
    num_batches: int = 0
    num_skipped_batches: int = 0
    reached: set[str] = field(default_factory=set)
    unattributed: set[str] = field(default_factory=set)

    @classmethod
    def for_layers(cls, shapes: Mapping[str, tuple[int, int]]) -> AdapterMoments:
        """No moments yet, for layers with these numbers of parts and ranks."""
        return cls((_no_moments(shapes), _no_moments(shapes)), dict(shapes))

    @property
    def num_examples(self) -> int:
        """Examples in the batches that were used."""
        return sum(map(sum, self.batch_sizes))

    @property
    def terms_per_example(self) -> float:
        """Mean number of loss terms of an example."""
        return self.num_loss_terms / self.num_examples

    def measure(self, layer: TargetLayer, calls: Sequence[LayerCall], rows: BatchRows) -> MeasuredLayer:
        """The moments of one layer in one batch."""
        assert isinstance(layer, AdaptedLayer)
        assert layer.component_type is not None
        moments = layer.component_type.measure(layer, calls, rows.num_groups)
        if rows.num_groups != rows.batch_size:
            self.unattributed.add(layer.name)
        return MeasuredLayer(moments, rows.num_loss_terms)

    def add(self, measured: Mapping[str, MeasuredLayer], batch_size: int | None, loss: Tensor | None) -> None:
        """Add a batch. One in which the loss or a gradient is not finite is skipped for all layers."""
        half = self.num_batches % 2
        self.num_batches += 1
        on_host = {name: _to_host(layer) for name, layer in measured.items()}
        values = [array for moments in on_host.values() for array in moments]
        if loss is not None:
            values.append(loss.detach().float().cpu().numpy())
        if not all(np.isfinite(array).all() for array in values):
            self.num_skipped_batches += 1
            return
        size = batch_size or max((len(core) for _, _, core in on_host.values()), default=1)
        self.batch_sizes[half].append(size)
        self.num_loss_terms += next((layer.num_loss_terms for layer in measured.values()), size)
        self.reached.update(measured)
        for name, moments in self.halves[half].items():
            self.halves[half][name] = moments + self._of_batch(name, on_host.get(name), size)

    def _of_batch(self, name: str, moments: tuple[Array, Array, Array] | None, size: int) -> LayerMoments:
        parts, rank = self.shapes[name]
        core = np.zeros((size, parts, rank, rank), np.float32)
        if moments is None:
            zero = np.zeros((parts, rank, rank))
            return LayerMoments(zero, zero, [core])
        inputs, gradients, measured = moments
        core[: len(measured)] = measured
        return LayerMoments(inputs, gradients, [core])

    def merge(self, others: Sequence[AdapterMoments]) -> AdapterMoments:
        """The moments over the batches of all processes."""
        several = [self, *others]
        first, second = (
            {name: reduce(add, (one.halves[half][name] for one in several)) for name in self.shapes} for half in (0, 1)
        )
        return AdapterMoments(
            (first, second),
            self.shapes,
            tuple([size for one in several for size in one.batch_sizes[half]] for half in (0, 1)),  # type: ignore[arg-type]
            sum(one.num_loss_terms for one in several),
            sum(one.num_batches for one in several),
            sum(one.num_skipped_batches for one in several),
            set().union(*(one.reached for one in several)),
            set().union(*(one.unattributed for one in several)),
        )

    def of(self, name: str, half: int | None = None) -> LayerMoments:
        """The moments of a layer over all batches, or over those of one half."""
        return self.halves[0][name] + self.halves[1][name] if half is None else self.halves[half][name]

    def result(self, layers: Mapping[str, TargetLayer]) -> AdapterMoments:
        """The moments themselves, with warnings about what the user can act on.

        Raises:
            RuntimeError: If no batch was seen, no batch had finite gradients, or every gradient is zero.
        """
        require_usable(self)
        return self


@dataclass
class PathMoments:
    """Moments from batches in turn: with the adapter as it is, and with a part of its scaling. A `Statistic`.

    Attributes:
        whole: Moments with the adapter as it is.
        scaled: Moments with the scaling multiplied by `PATH_SCALE`.
        is_scaled: Whether the present batch is one of the second kind.
    """

    whole: AdapterMoments
    scaled: AdapterMoments
    is_scaled: bool = False

    @classmethod
    def for_layers(cls, shapes: Mapping[str, tuple[int, int]]) -> PathMoments:
        """No moments yet, for layers with these numbers of parts and ranks."""
        return cls(AdapterMoments.for_layers(shapes), AdapterMoments.for_layers(shapes))

    @classmethod
    def without_scaled(cls, whole: AdapterMoments) -> PathMoments:
        """Moments with the adapter as it is alone."""
        return cls(whole, AdapterMoments.for_layers(whole.shapes))

    @property
    def num_batches(self) -> int:
        """Batches seen."""
        return self.whole.num_batches + self.scaled.num_batches

    @property
    def num_skipped_batches(self) -> int:
        """Batches left out, because the loss or a gradient was not finite."""
        return self.whole.num_skipped_batches + self.scaled.num_skipped_batches

    @property
    def num_examples(self) -> int:
        """Examples in the batches that were used."""
        return self.whole.num_examples + self.scaled.num_examples

    @property
    def terms_per_example(self) -> float:
        """Mean number of loss terms of an example."""
        return (self.whole.num_loss_terms + self.scaled.num_loss_terms) / self.num_examples

    @property
    def _present(self) -> AdapterMoments:
        return self.scaled if self.is_scaled else self.whole

    def measure(self, layer: TargetLayer, calls: Sequence[LayerCall], rows: BatchRows) -> MeasuredLayer:
        """The moments of one layer in the present batch."""
        return self._present.measure(layer, calls, rows)

    def add(self, measured: Mapping[str, MeasuredLayer], batch_size: int | None, loss: Tensor | None) -> None:
        """Add the present batch; see `AdapterMoments.add`."""
        self._present.add(measured, batch_size, loss)

    def merge(self, others: Sequence[PathMoments]) -> PathMoments:
        """The moments over the batches of all processes."""
        whole, scaled = ([getattr(one, kind) for one in others] for kind in ("whole", "scaled"))
        return PathMoments(self.whole.merge(whole), self.scaled.merge(scaled))

    def result(self, layers: Mapping[str, TargetLayer]) -> PathMoments:
        """The moments themselves; see `AdapterMoments.result`. Batches with the adapter as it is are needed."""
        require_usable(self.whole.merge([self.scaled]))
        if not self.whole.num_examples:
            raise RuntimeError(
                f"All {self.whole.num_batches} calibration batches that ran with the adapter as it is had a loss or "
                "gradients that are not finite: calibrate in bfloat16 or float32, or with more batches."
            )
        if self.scaled.num_batches and not self.scaled.num_examples:
            warn_user(
                "All calibration batches that ran with a quarter of the adapter's scaling were left out, so the "
                "components have no gains and are ordered by saliency and norm. Calibrate in bfloat16 or float32, or "
                "with more batches."
            )
        return self


def require_usable(moments: AdapterMoments) -> None:
    """Raise `RuntimeError` for moments that say nothing; warn of what the user can act on."""
    require_usable_batches(moments.num_batches, moments.num_skipped_batches)
    if not any(np.any(core) for name in moments.shapes for core in moments.of(name).core_gradients):
        raise RuntimeError(
            "The gradient of every component is exactly zero: the adapter is untrained (its B is zero), or the "
            f"loss does not depend on it. {CAUSES_OF_NO_GRADIENT}"
        )
    _warn(moments)


def _no_moments(shapes: Mapping[str, tuple[int, int]]) -> dict[str, LayerMoments]:
    zeros = {name: np.zeros((parts, rank, rank)) for name, (parts, rank) in shapes.items()}
    return {name: LayerMoments(zero, zero) for name, zero in zeros.items()}


def _to_host(layer: MeasuredLayer) -> tuple[Array, Array, Array]:
    """The moments for the summed loss, of which the back-propagated loss is the mean."""
    inputs, gradients, core = (
        tensor.detach().cpu().double().numpy()
        for tensor in (layer.moments.inputs, layer.moments.gradients, layer.moments.core_gradients)
    )
    squared_terms = float(layer.num_loss_terms) ** 2
    if layer.moments.inputs_have_gradients:
        inputs = inputs * squared_terms
    return inputs, gradients * squared_terms, core * layer.num_loss_terms


def _warn(moments: AdapterMoments) -> None:
    warn_of_skipped_batches(moments.num_batches, moments.num_skipped_batches)
    warn_of_unattributed_layers(moments.unattributed, "saliencies")
    warn_of_unreached_layers(
        moments.shapes,
        moments.reached,
        "layers",
        ", so their adapters count as worth nothing",
        "Calibrate with data that reaches them, or leave them out of the adapter.",
    )
