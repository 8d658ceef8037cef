"""`SizeCurve`: sizes that a trained adapter could have, what they cost, and the JSON file of these."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
from typing_extensions import Self

from ..runtime.atomic import write_text
from ..runtime.checked_json import read_json, require_integer, require_layer_name, require_number
from .compressed import Compression
from .sizes import SizePoint, read_prediction
from .spectrum import Spectrum
from .truncation import by_layer, keep_within

SIZE_CURVE_FILE = "fim_size_curve.json"
"""Name of the file in an output folder."""

SCHEMA_VERSION = 1

Measured = tuple[int, float]
"""A measured loss: the parameters of the adapter, and the increase of the loss in units of the loss."""

# The curve goes down to this share of the adapter, or further if a measured or chosen size is smaller.
_SMALLEST_SHARE = 1 / 32
_NUM_SIZES = 48


@dataclass(frozen=True)
class SizeCurve:
    """What a spectrum says about the sizes of an adapter, without the spectrum, whose file is much larger.

    Attributes:
        points: The sizes, from the smallest to the whole adapter, or to the largest under `r_max`.
        measured: Measured losses, by rising size.
        num_parameters: Entries of A and B of the whole adapter.
        criterion: What orders the components, for people to read.
    """

    points: Sequence[SizePoint]
    measured: Sequence[Measured]
    num_parameters: int
    criterion: str

    @classmethod
    def of(cls, spectrum: Spectrum, chosen: Compression | None = None, measured: Sequence[Measured] = ()) -> Self:
        """The curve of a spectrum, with the size of a compression by it and its measured loss among the others.

        Raises `ValueError` if `chosen` has other layers than the spectrum.
        """
        if chosen is not None and chosen.ranks_before != spectrum.ranks:
            raise ValueError("The compression has other layers or ranks than the spectrum: pass the spectrum of it.")
        if chosen is not None and chosen.loss_increase is not None:
            measured = [*measured, (chosen.num_parameters, chosen.loss_increase)]
        points = _points(spectrum, chosen, measured)
        return cls(points, sorted(measured), spectrum.num_parameters, spectrum.criterion)

    @property
    def layers(self) -> list[str]:
        """Names of the layers."""
        return list(self.points[0].ranks)

    @property
    def with_data(self) -> bool:
        """Whether a loss is predicted."""
        return self.points[0].prediction is not None

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types. The ranks of a point are in the order of `layers`."""
        return {
            "num_parameters": self.num_parameters,
            "criterion": self.criterion,
            "measured": [list(one) for one in self.measured],
            "layers": self.layers,
            "points": [
                {
                    "parameters": point.parameters,
                    "predicted": None if point.prediction is None else list(point.prediction),
                    "dropped_norm": point.dropped_norm,
                    "ranks": list(point.ranks.values()),
                }
                for point in self.points
            ],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises `KeyError` if an entry is missing, `TypeError` or `AttributeError` if a value has the wrong type,
        `ValueError` if a value is out of its range or sizes do not fit, and `OverflowError` for too large integers.
        """
        layers = [require_layer_name(name) for name in content["layers"]]
        total = require_integer(content["num_parameters"], 1)
        if not layers or len(set(layers)) < len(layers):
            raise ValueError("there are no layers, or a layer appears twice")
        points = [_point(one, layers, total) for one in content["points"]]
        sizes = [point.parameters for point in points]
        if not sizes or sizes != sorted(set(sizes)) or sizes[-1] > total:
            raise ValueError("there are no sizes, or they do not rise up to the whole adapter")
        if len({point.prediction is None for point in points}) > 1:
            raise ValueError("some sizes have a prediction and others do not")
        if not isinstance(content["criterion"], str) or not content["criterion"].isprintable():
            raise ValueError("criterion is not printable text")
        measured = [(require_integer(size, 0), require_number(increase)) for size, increase in content["measured"]]
        return cls(points, sorted(measured), total, content["criterion"])

    def save(self, path: str | PathLike[str]) -> None:
        """Write the curve as JSON, completely or not at all. Raises `OSError` if that fails."""
        header = {"format": "fim_size_curve", "schema_version": SCHEMA_VERSION}
        # In one line: with one for each rank, the file would be several times as large.
        write_text(path, json.dumps(header | self.to_dict(), allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises `OSError` if the file cannot be read, and `InvalidFileError` if it is damaged, not a size curve, or from
        a newer version of fim-lora.
        """
        return read_json(path, "fim_size_curve", SCHEMA_VERSION, cls.from_dict, "Compress again.")


def _point(content: Mapping[str, Any], layers: Sequence[str], total: int) -> SizePoint:
    parameters, prediction = require_integer(content["parameters"], 1), read_prediction(content["predicted"])
    ranks = [require_integer(rank, 0) for rank in content["ranks"]]
    dropped_norm = require_number(content["dropped_norm"])
    return SizePoint(parameters, parameters / total, prediction, dict(zip(layers, ranks, strict=True)), dropped_norm)


def _points(spectrum: Spectrum, chosen: Compression | None, measured: Sequence[Measured]) -> list[SizePoint]:
    """Sizes with equal ratios between them, as far as the numbers of components allow."""
    # `Spectrum.keep` would sort all components again for every size.
    order, costs, names = spectrum.order(), spectrum.costs, list(spectrum)
    maximum = spectrum.max_components(None if chosen is None else chosen.r_max)
    sizes = [parameters for parameters, _ in measured] + ([] if chosen is None else [chosen.num_parameters])
    total = spectrum.num_parameters
    smallest = min([total * _SMALLEST_SHARE, *(size * 0.8 for size in sizes if size > 0)])
    budgets = {int(budget) for budget in np.geomspace(max(smallest, 1), total, _NUM_SIZES)} | {total, *sizes}
    points: dict[int, SizePoint] = {}
    for budget in sorted(budgets):
        point = spectrum.point_of(by_layer(keep_within(order, costs, budget, maximum), names))
        if point.parameters > 0:
            points[point.parameters] = point
    if chosen is not None:
        # Where every layer has to keep an adapter, the choice is not that of the order alone.
        points[chosen.num_parameters] = spectrum.point_of(spectrum.kept_of(chosen.ranks))
    return [points[parameters] for parameters in sorted(points)]
