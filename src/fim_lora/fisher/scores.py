"""`LayerScore` and `FimScores`: how sensitive the loss is to each layer, and how uncertain that is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any, cast

from ..runtime.atomic import write_json
from ..runtime.checked_json import read_json, require_boolean, require_integer, require_layer_name, require_number
from .converted_targets import ConvertedTargets

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class LayerScore:
    """The score of one layer.

    Attributes:
        mean: `mean(F)`, the eFIM diagonal averaged over the entries of the weight: squared loss per squared unit
            of weight.
        standard_error: Standard error of `mean` over examples, in the same unit. `None` if it is not known: with
            a single example, or for scores that were passed and not measured.
        num_examples: Number of examples in the average. A batch counts as one example if the input of the layer
            cannot be attributed to examples; 0 for scores that were passed and not measured.
        shape: `(d_out, d_in)` of the weight.
        parameters_per_rank: Adapter parameters of one rank. `None` is replaced by `d_in + d_out`, which is correct for
            one d_out × d_in matrix.
        rank_step: The rank must be a multiple of it, such as the groups of a grouped convolution in PEFT.
        exact: Whether the per-example gradients were read exactly. If not, long examples were read through a random
            projection. It adds no bias; its noise is included in `standard_error`. See `FimConfig.exact`.
        num_entries: Entries of all weights that share the rank, such as those of all experts of a parameter. `None` is
            replaced by `d_out · d_in`, which is correct for one d_out × d_in matrix.

    Raises:
        ValueError: If a value is out of its range.
    """

    mean: float
    standard_error: float | None
    num_examples: int
    shape: tuple[int, int]
    parameters_per_rank: int | None = None
    rank_step: int = 1
    exact: bool = True
    num_entries: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and self.mean >= 0):
            raise ValueError(f"mean must be finite and not negative, got {self.mean!r}.")
        if self.standard_error is not None and not (math.isfinite(self.standard_error) and self.standard_error >= 0):
            raise ValueError(f"standard_error must be finite and not negative, got {self.standard_error!r}.")
        if self.num_examples < 0:
            raise ValueError(f"num_examples must not be negative, got {self.num_examples!r}.")
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise ValueError(f"shape must be (d_out, d_in) of positive integers, got {self.shape!r}.")
        if self.parameters_per_rank is None:
            object.__setattr__(self, "parameters_per_rank", sum(self.shape))  # the class is frozen
        elif self.parameters_per_rank < 1:
            raise ValueError(f"parameters_per_rank must be a positive integer, got {self.parameters_per_rank!r}.")
        if self.rank_step < 1:
            raise ValueError(f"rank_step must be a positive integer, got {self.rank_step!r}.")
        if self.num_entries is None:
            object.__setattr__(self, "num_entries", math.prod(self.shape))
        elif self.num_entries < 1:
            raise ValueError(f"num_entries must be a positive integer, got {self.num_entries!r}.")

    @property
    def norm(self) -> float:
        """`√(Σ F)`, the root mean square over examples of the norm of their gradients, in loss per unit of weight."""
        assert self.num_entries is not None
        return math.sqrt(self.mean * self.num_entries)


class FimScores(Mapping[str, LayerScore]):
    """A mapping from layer name, as in the base model, to `LayerScore`.

    Args:
        layers: The scores by layer name.
        num_batches: Number of calibration batches.
        num_skipped_batches: How many of them were skipped, because the loss or a gradient was not finite.
        converted_targets: The targets of the config for which a plain model was scored, if PEFT converts them.
    """

    def __init__(
        self,
        layers: Mapping[str, LayerScore],
        num_batches: int = 0,
        num_skipped_batches: int = 0,
        converted_targets: ConvertedTargets | None = None,
    ) -> None:
        self._layers = dict(layers)
        self.num_batches = num_batches
        self.num_skipped_batches = num_skipped_batches
        self.converted_targets = converted_targets

    def __getitem__(self, name: str) -> LayerScore:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"FimScores({len(self)} layers, {self.num_batches} batches, {self.num_examples} examples)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FimScores):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # compared by value

    @property
    def num_examples(self) -> int:
        """Number of calibration examples: the largest over the layers."""
        return max((score.num_examples for score in self.values()), default=0)

    @property
    def measured(self) -> str:
        """Summary of the measurement for people to read, such as `32 examples in 4 batches`."""
        text = f"{self.num_examples:,} examples in {self.num_batches:,} batches"
        projected = sum(not score.exact for score in self.values())
        return text if projected == 0 else f"{text}, {projected} of {len(self)} layers through a random projection"

    @property
    def means(self) -> dict[str, float]:
        """Layer name to `LayerScore.mean`, as an argument of `allocate_ranks`."""
        return {name: score.mean for name, score in self.items()}

    @property
    def norms(self) -> dict[str, float]:
        """Layer name to `LayerScore.norm`, as an argument of `allocate_ranks`."""
        return {name: score.norm for name, score in self.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Layer name to `(d_out, d_in)`, as an argument of `allocate_ranks`."""
        return {name: score.shape for name, score in self.items()}

    @property
    def parameters_per_rank(self) -> dict[str, int]:
        """Layer name to `LayerScore.parameters_per_rank`, as an argument of `allocate_ranks`."""
        # `LayerScore.__post_init__` has replaced `None`.
        return {name: cast(int, score.parameters_per_rank) for name, score in self.items()}

    @property
    def rank_steps(self) -> dict[str, int]:
        """Layer name to `LayerScore.rank_step`, as an argument of `allocate_ranks`."""
        return {name: score.rank_step for name, score in self.items()}

    def for_targets(self, converted_targets: ConvertedTargets | None) -> FimScores:
        """The same scores with other `converted_targets`."""
        return FimScores(self._layers, self.num_batches, self.num_skipped_batches, converted_targets)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types."""
        converted = self.converted_targets
        return {
            "num_batches": self.num_batches,
            "num_skipped_batches": self.num_skipped_batches,
            **({} if converted is None else {"converted_targets": converted.to_dict()}),
            "layers": {name: asdict(score) | {"shape": list(score.shape)} for name, score in self.items()},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> FimScores:
        """The inverse of `to_dict`.

        Raises `KeyError` if a field is missing, `TypeError` or `AttributeError` if a value has the wrong type,
        `ValueError` if it is out of its range, and `OverflowError` if an integer is too large for a float.
        """
        layers = {require_layer_name(name): _layer_from_dict(score) for name, score in content["layers"].items()}
        counts = (require_integer(content["num_batches"], 0), require_integer(content["num_skipped_batches"], 0))
        converted = content.get("converted_targets")
        return cls(layers, *counts, None if converted is None else ConvertedTargets.from_dict(converted))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the scores as JSON, completely or not at all. Raises `OSError` if the file cannot be written."""
        write_json(path, {"format": "fim_scores", "schema_version": SCHEMA_VERSION, **self.to_dict()})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> FimScores:
        """Read what `save` wrote.

        Raises `OSError` if the file cannot be read, and `InvalidFileError` if it is damaged, not a file of scores, or
        from a newer version of fim-lora.
        """
        return read_json(path, "fim_scores", SCHEMA_VERSION, cls.from_dict, "Compute the scores again.")


def _layer_from_dict(content: Mapping[str, Any]) -> LayerScore:
    standard_error, parameters_per_rank = content["standard_error"], content.get("parameters_per_rank")
    return LayerScore(
        mean=require_number(content["mean"]),
        standard_error=None if standard_error is None else require_number(standard_error),
        num_examples=require_integer(content["num_examples"], 0),
        shape=_shape(content["shape"]),
        parameters_per_rank=None if parameters_per_rank is None else require_integer(parameters_per_rank, 1),
        rank_step=require_integer(content.get("rank_step", 1), 1),
        exact=require_boolean(content.get("exact", True)),
        num_entries=None if content.get("num_entries") is None else require_integer(content["num_entries"], 1),
    )


def _shape(sizes: Any) -> tuple[int, int]:
    d_out, d_in = sizes
    return require_integer(d_out, 1), require_integer(d_in, 1)
