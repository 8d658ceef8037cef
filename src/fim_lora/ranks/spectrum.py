"""`Spectrum`: what every component of a trained adapter is worth, and the JSON file of it."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

from ..config import FINGERPRINT_LENGTH
from ..runtime.atomic import write_json
from ..runtime.checked_json import read_json, require_integer, require_layer_name, require_number
from .sizes import SHOWN_SHARES, Prediction, SizePoint, format_rows, size_rows
from .truncation import Component, Kept, by_layer, keep_within, order_of_components, priorities

Array = npt.NDArray[np.float32]

SCHEMA_VERSION = 1


@dataclass(frozen=True, eq=False)
class LayerSpectrum:
    """The components of the adapter of one layer, those to keep first at the beginning.

    An adapter of P parts (experts, groups, the two of an attention) has as many components as each part has ranks:
    component j consists of the j-th of every part, because PEFT gives all parts one rank.

    Attributes:
        shape: `(d_out, d_in)` of the weight.
        parameters_per_rank: Adapter parameters of one rank.
        rank_step: Ranks in one component: the groups of a grouped convolution, otherwise 1.
        scaling: The layer's scaling, `lora_alpha / r` or `lora_alpha / sqrt(r)`.
        fingerprint: Of the layer's A, B and scaling.
        left: Columns of the components (P × k × k): the new B of a part is `B · left`.
        right: Rows of the components (P × k × k): the new A of a part is `right · A`.
        gates: Gradients of gates on the components (N × k), one row for each example of the batches that ran with the
            adapter as it is, divided by the root of the mean number of loss terms of an example; `None` without data.
        squared_norms: `‖ΔW_j‖²_F` of every component (k), summed over the parts.
        gains: Minus the mean gradient of the gate on component j (k) with the adapter at a quarter of its scaling, in
            units of the loss: how fast the loss falls there as the component grows. `None` without such batches.
    """

    shape: tuple[int, int]
    parameters_per_rank: int
    rank_step: int
    scaling: float
    fingerprint: str
    left: Array
    right: Array
    gates: Array | None
    squared_norms: Array
    gains: Array | None = None

    @property
    def num_components(self) -> int:
        """Number of components, k."""
        return int(self.left.shape[-1])

    @property
    def rank(self) -> int:
        """Rank of the layer."""
        return self.num_components * self.rank_step

    @property
    def parameters_per_component(self) -> int:
        """Adapter parameters of one component."""
        return self.parameters_per_rank * self.rank_step

    @cached_property
    def saliencies(self) -> list[float]:
        """`½ E_t[q_tj²]`: the predicted increase of the loss when component j is dropped; without data `‖ΔW_j‖²_F`.

        In units of the loss, for a loss at its minimum (LeCun et al. 1989, equation 5).
        """
        if self.gates is None:
            return [float(value) for value in self.squared_norms]
        return [float(value) for value in np.square(self.gates, dtype=np.float64).mean(0) / 2]

    @cached_property
    def priorities(self) -> list[float]:
        """What the components are ordered by, in units of the loss if there are gains; see `truncation.priorities`."""
        return [float(value) for value in priorities(self.saliencies, self.squared_norms, self.gains)]

    @property
    def standard_errors(self) -> list[float] | None:
        """Standard errors of the saliencies over examples; `None` without data or with one example."""
        if self.gates is None or len(self.gates) < 2:
            return None
        halves = np.square(self.gates, dtype=np.float64) / 2
        return [float(value) for value in halves.std(0, ddof=1) / math.sqrt(len(halves))]


class Spectrum(Mapping[str, LayerSpectrum]):
    """Layer name, as in the base model, to the components of its adapter.

    Args:
        layers: The layers.
        adapter_name: The adapter.
        num_batches: Number of calibration batches; 0 without data.
        num_skipped_batches: How many of them were skipped, because the loss or a gradient was not finite.
        num_examples: Calibration examples; 0 without data.
        num_scaled_examples: How many of them are of the batches that ran with a quarter of the adapter's scaling.
        terms_per_example: Mean number of terms of the loss in an example: tokens with a label for a language model, 1
            for a classifier.
    """

    def __init__(
        self,
        layers: Mapping[str, LayerSpectrum],
        adapter_name: str = "default",
        num_batches: int = 0,
        num_skipped_batches: int = 0,
        num_examples: int = 0,
        terms_per_example: float = 1.0,
        num_scaled_examples: int = 0,
    ) -> None:
        self._layers = dict(layers)
        self.adapter_name = adapter_name
        self.num_batches = num_batches
        self.num_skipped_batches = num_skipped_batches
        self.num_examples = num_examples
        self.terms_per_example = terms_per_example
        self.num_scaled_examples = num_scaled_examples

    def __getitem__(self, name: str) -> LayerSpectrum:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Spectrum):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # compared by value

    @property
    def with_data(self) -> bool:
        """Whether the components were measured on data; otherwise they are those of the plain SVD of `ΔW`."""
        return self.num_batches > 0

    @property
    def criterion(self) -> str:
        """What orders the components, for people to read."""
        if not self.with_data:
            return "without data (plain SVD of the weights, blind to the loss)"
        scaled = self.num_scaled_examples
        gains = f" and gains of {scaled:,}" if scaled else ""
        return f"Fisher information of {self.num_examples - scaled:,}{gains} examples in {self.num_batches:,} batches"

    @property
    def costs(self) -> dict[str, int]:
        """Layer name to the parameters of one component."""
        return {name: layer.parameters_per_component for name, layer in self.items()}

    @property
    def ranks(self) -> dict[str, int]:
        """Layer name to its present rank."""
        return {name: layer.rank for name, layer in self.items()}

    @property
    def num_parameters(self) -> int:
        """Entries of A and B over all layers."""
        return sum(layer.parameters_per_rank * layer.rank for layer in self.values())

    def order(self, at_least: Mapping[str, int] | None = None) -> list[Component]:
        """All components by falling priority per parameter; those that `at_least` requires of a layer come first."""
        return order_of_components({name: layer.priorities for name, layer in self.items()}, self.costs, at_least)

    def keep(self, parameters: int, *, r_max: int | None = None, at_least: Mapping[str, int] | None = None) -> Kept:
        """The components of an adapter of at most this many parameters, without a rank above `r_max`."""
        return by_layer(
            keep_within(self.order(at_least), self.costs, parameters, self.max_components(r_max)), list(self)
        )

    def max_components(self, r_max: int | None) -> dict[str, int] | None:
        """Layer name to the largest number of components under a cap on the rank; `None` without a cap."""
        return None if r_max is None else {name: r_max // layer.rank_step for name, layer in self.items()}

    def ranks_of(self, kept: Kept) -> dict[str, int]:
        """Layer name to the rank of a selection of components."""
        return {name: len(kept[name]) * layer.rank_step for name, layer in self.items()}

    def parameters_of(self, kept: Kept) -> int:
        """Entries of A and B of a selection of components."""
        return sum(len(kept[name]) * cost for name, cost in self.costs.items())

    def predict(self, kept: Kept) -> Prediction | None:
        """The predicted increase of the loss when all other components are dropped; `None` without data.

        `mean_t(½ S_t² - S_t) / n`, with `S_t` the gradient of the example's summed loss with respect to one gate on
        all dropped components together and n the loss terms of an example: the expansion of the loss to second order,
        with the empirical Fisher information, correlations between components included, as its Hessian.
        """
        if not self.with_data:
            return None
        total = np.zeros(self.num_examples - self.num_scaled_examples)
        for name, layer in self.items():
            dropped = sorted(set(range(layer.num_components)).difference(kept[name]))
            if dropped and layer.gates is not None:
                total += layer.gates[:, dropped].sum(1, dtype=np.float64)
        by_example = total**2 / 2 - total / math.sqrt(self.terms_per_example)
        if len(by_example) < 2:
            return Prediction(float(by_example.mean()), None)
        return Prediction(float(by_example.mean()), float(by_example.std(ddof=1) / math.sqrt(len(by_example))))

    def parameters_of_share(self, share: float) -> int:
        """The parameters that are at most this share of the whole adapter; rounding errors of the share do not count.

        Without the tolerance, `SizePoint.share` would not always lead back to its own size.
        """
        return math.floor(share * self.num_parameters * (1 + 1e-12))

    def size_point(self, parameters: int, *, r_max: int | None = None) -> SizePoint:
        """The adapter with at most this many parameters."""
        return self.point_of(self.keep(parameters, r_max=r_max))

    def point_of(self, kept: Kept) -> SizePoint:
        """The adapter with a selection of components."""
        used = self.parameters_of(kept)
        norms = [layer.squared_norms.astype(np.float64) for layer in self.values()]
        kept_norm = sum(float(norm[kept[name]].sum()) for name, norm in zip(self, norms, strict=True))
        norm = sum(float(one.sum()) for one in norms)
        dropped_norm = max(1 - kept_norm / norm, 0.0) if norm > 0 else 0.0
        return SizePoint(used, used / self.num_parameters, self.predict(kept), self.ranks_of(kept), dropped_norm)

    def kept_of(self, ranks: Mapping[str, int]) -> Kept:
        """The components that layers of these ranks keep: those of the highest priority."""
        kept = {}
        for name, layer in self.items():
            by_value = sorted(range(layer.num_components), key=[-value for value in layer.priorities].__getitem__)
            kept[name] = sorted(by_value[: ranks[name] // layer.rank_step])
        return kept

    def size_curve(self, shares: Sequence[float] = SHOWN_SHARES) -> list[SizePoint]:
        """The adapter at each of these shares of its parameters."""
        return [self.size_point(self.parameters_of_share(share)) for share in shares]

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types. Arrays are base64 of float32, the smallest byte first."""
        return {
            "adapter_name": self.adapter_name,
            "num_batches": self.num_batches,
            "num_skipped_batches": self.num_skipped_batches,
            "num_examples": self.num_examples,
            "num_scaled_examples": self.num_scaled_examples,
            "terms_per_example": self.terms_per_example,
            "layers": {name: _layer_to_dict(layer) for name, layer in self.items()},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises `KeyError` if a field is missing, `TypeError` or `AttributeError` if a value has the wrong type,
        `ValueError` if a value is out of its range or sizes do not fit, and `OverflowError` for too large integers.
        """
        counts = ("num_batches", "num_skipped_batches", "num_examples", "num_scaled_examples")
        batches, skipped, examples, scaled = (require_integer(content[key], 0) for key in counts)
        if (batches > 0) != (examples > 0) or (scaled > 0 and scaled >= examples):
            raise ValueError("num_batches, num_examples and num_scaled_examples do not fit")
        layers = {
            require_layer_name(name): _layer_from_dict(layer, examples - scaled, scaled > 0)
            for name, layer in content["layers"].items()
        }
        if not layers:
            raise ValueError("there are no layers")
        terms = require_number(content["terms_per_example"])
        if terms <= 0:
            raise ValueError(f"terms_per_example is {terms}, not positive")
        return cls(layers, require_layer_name(content["adapter_name"]), batches, skipped, examples, terms, scaled)

    def save(self, path: str | PathLike[str], **provenance: Any) -> None:
        """Write the spectrum as JSON, completely or not at all.

        `provenance` has JSON values to write with it; `load` ignores them.
        Raises `OSError` if the file cannot be written, and `TypeError` or `ValueError` if `provenance` is not JSON.
        """
        header = {"format": "fim_spectrum", "schema_version": SCHEMA_VERSION}
        write_json(path, header | {"provenance": provenance} | self.to_dict())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises `OSError` if the file cannot be read, and `InvalidFileError` if it is damaged, not a spectrum, or from a
        newer version of fim-lora.
        """
        return read_json(path, "fim_spectrum", SCHEMA_VERSION, cls.from_dict, "Measure the spectrum again.")

    def __str__(self) -> str:
        heading = f"{len(self)} layers, {self.num_parameters:,} parameters, {self.criterion}"
        return f"{heading}\n\n{format_rows(size_rows(self.size_curve((1.0, *SHOWN_SHARES))))}"

    __repr__ = __str__


def _layer_to_dict(layer: LayerSpectrum) -> dict[str, Any]:
    return {
        "shape": list(layer.shape),
        "parameters_per_rank": layer.parameters_per_rank,
        "rank_step": layer.rank_step,
        "scaling": layer.scaling,
        "fingerprint": layer.fingerprint,
        "num_parts": int(layer.left.shape[0]),
        "num_components": layer.num_components,
        "left": _encode(layer.left),
        "right": _encode(layer.right),
        "gates": None if layer.gates is None else _encode(layer.gates),
        "squared_norms": _encode(layer.squared_norms),
        "gains": None if layer.gains is None else _encode(layer.gains),
    }


def _layer_from_dict(content: Mapping[str, Any], examples: int, has_gains: bool) -> LayerSpectrum:
    d_out, d_in = content["shape"]
    parts, size = (require_integer(content[key], 1) for key in ("num_parts", "num_components"))
    fingerprint = content["fingerprint"]
    if not isinstance(fingerprint, str) or len(fingerprint) != FINGERPRINT_LENGTH or not fingerprint.isalnum():
        raise ValueError(f"{fingerprint!r} is not a fingerprint")
    squared_norms = _decode(content["squared_norms"], (size,))
    if squared_norms.min() < 0:
        raise ValueError("a squared norm is negative")
    if (content["gates"] is None) != (examples == 0):
        raise ValueError("gates and num_examples do not fit")
    if (content["gains"] is None) == has_gains:
        raise ValueError("gains and num_scaled_examples do not fit")
    return LayerSpectrum(
        shape=(require_integer(d_out, 1), require_integer(d_in, 1)),
        parameters_per_rank=require_integer(content["parameters_per_rank"], 1),
        rank_step=require_integer(content["rank_step"], 1),
        scaling=require_number(content["scaling"]),
        fingerprint=fingerprint,
        left=_decode(content["left"], (parts, size, size)),
        right=_decode(content["right"], (parts, size, size)),
        gates=None if examples == 0 else _decode(content["gates"], (examples, size)),
        squared_norms=squared_norms,
        gains=_decode(content["gains"], (size,)) if has_gains else None,
    )


def _encode(array: Array) -> str:
    return base64.b64encode(array.astype("<f4").tobytes()).decode("ascii")


def _decode(text: Any, shape: tuple[int, ...]) -> Array:
    if not isinstance(text, str):
        raise TypeError("an array is not text")
    content = base64.b64decode(text, validate=True)
    if len(content) != 4 * math.prod(shape):
        raise ValueError(f"an array has {len(content)} bytes, not {4 * math.prod(shape)} for its shape {shape}")
    array = np.frombuffer(content, "<f4").reshape(shape).astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError("an array has numbers that are not finite")
    return array
