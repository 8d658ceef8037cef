"""`Compression`: what a truncation of an adapter kept and what it costs, and the JSON file of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

from typing_extensions import Self

from ..config import integer_if_whole
from ..runtime.atomic import write_json
from ..runtime.checked_json import (
    read_json,
    require_boolean,
    require_integer,
    require_layer_name,
    require_number,
)
from .layer_grid import format_grid
from .sizes import Prediction, format_prediction, format_rows, read_prediction

COMPRESSION_FILE = "fim_compression.json"
"""Name of the file in an output folder."""

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Compression:
    """The ranks of an adapter before and after its truncation, and the loss that it costs.

    Its subclass `fim_lora.LoraCompression` adds PEFT's patterns and pictures.

    Attributes:
        ranks: Layer name, as in the base model, to rank. 0 means that the layer has lost its adapter.
        ranks_before: Layer name to the rank before.
        alphas: Layer name to `lora_alpha` of the layer; of a layer of rank 0, the one before.
        parameters_per_rank: Layer name to the adapter parameters of one rank.
        r: Global rank of the new LoRA config.
        lora_alpha: Global `lora_alpha` of the new LoRA config.
        use_rslora: Whether the scaling is `lora_alpha / sqrt(r_i)` and not `lora_alpha / r_i`.
        size: The requested size: `keep`, `r` or `max_loss_increase`, and its value.
        r_max: Largest rank that was allowed; `None` for any.
        criterion: What ordered the components, for people to read.
        predicted: Predicted increase of the loss; `None` without data.
        loss_before: Measured loss before; `None` without `eval_dataloader`.
        loss_after: Measured loss after; `None` without `eval_dataloader`.
    """

    ranks: dict[str, int]
    ranks_before: dict[str, int]
    alphas: dict[str, float]
    parameters_per_rank: dict[str, int]
    r: int
    lora_alpha: float
    use_rslora: bool
    size: tuple[str, float]
    r_max: int | None
    criterion: str
    predicted: Prediction | None
    loss_before: float | None = None
    loss_after: float | None = None

    @property
    def dropped_layers(self) -> list[str]:
        """The layers that have lost their adapter."""
        return [name for name, rank in self.ranks.items() if rank == 0]

    @property
    def num_parameters(self) -> int:
        """Entries of A and B after the truncation."""
        return sum(rank * self.parameters_per_rank[name] for name, rank in self.ranks.items())

    @property
    def num_parameters_before(self) -> int:
        """Entries of A and B before the truncation."""
        return sum(rank * self.parameters_per_rank[name] for name, rank in self.ranks_before.items())

    @property
    def share(self) -> float:
        """Parameters after as a share of those before."""
        return self.num_parameters / self.num_parameters_before

    @property
    def loss_increase(self) -> float | None:
        """Measured increase of the loss; `None` without `eval_dataloader`."""
        if self.loss_before is None or self.loss_after is None:
            return None
        return self.loss_after - self.loss_before

    def rows(self) -> list[list[str]]:
        """A table of before and after, for people to read."""
        ranks, before = self.ranks.values(), self.ranks_before.values()
        increase = self.loss_increase
        return [
            ["", "before", "after"],
            ["parameters", f"{self.num_parameters_before:,}", f"{self.num_parameters:,} ({self.share:.1%})"],
            ["largest rank", str(max(before)), str(max(ranks))],
            ["layers with an adapter", str(len(self.ranks)), str(len(self.ranks) - len(self.dropped_layers))],
            ["predicted loss", "", format_prediction(self.predicted)],
            [
                "measured loss",
                "unknown" if self.loss_before is None else f"{self.loss_before:.4f}",
                "unknown" if increase is None else f"{self.loss_after:.4f} ({increase:+.2g})",
            ],
        ]

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types."""
        content = asdict(self)
        return content | {
            "size": list(self.size),
            "predicted": None if self.predicted is None else list(self.predicted),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises `KeyError` if an entry is missing, `TypeError` or `AttributeError` if a value has the wrong type,
        `ValueError` if a value is out of its range or layers are missing, and `OverflowError` if an integer is too
        large for a float.
        """
        ranks, before = (_integers(content[key], 0) for key in ("ranks", "ranks_before"))
        alphas = {name: require_number(alpha) for name, alpha in content["alphas"].items()}
        parameters_per_rank = _integers(content["parameters_per_rank"], 1)
        if not ranks or not set(ranks) == set(before) == set(alphas) == set(parameters_per_rank):
            raise ValueError("ranks, ranks_before, alphas and parameters_per_rank name different layers or none")
        if any(rank > before[name] for name, rank in ranks.items()) or not any(ranks.values()):
            raise ValueError("a rank is larger than before, or all are 0")
        kind, value = content["size"]
        if kind not in ("keep", "r", "max_loss_increase"):
            raise ValueError(f"{kind!r} is not a kind of size")
        r_max = content["r_max"]
        losses = (content["loss_before"], content["loss_after"])
        if not isinstance(content["criterion"], str) or not content["criterion"].isprintable():
            raise ValueError("criterion is not printable text")
        return cls(
            ranks=ranks,
            ranks_before=before,
            alphas={name: integer_if_whole(alpha) for name, alpha in alphas.items()},
            parameters_per_rank=parameters_per_rank,
            r=require_integer(content["r"], 1),
            lora_alpha=require_number(content["lora_alpha"]),
            use_rslora=require_boolean(content["use_rslora"]),
            size=(kind, require_number(value)),
            r_max=None if r_max is None else require_integer(r_max, 1),
            criterion=content["criterion"],
            predicted=read_prediction(content["predicted"]),
            loss_before=None if losses[0] is None else require_number(losses[0]),
            loss_after=None if losses[1] is None else require_number(losses[1]),
        )

    def save(self, path: str | PathLike[str], **provenance: Any) -> None:
        """Write the result as JSON, completely or not at all.

        `provenance` has JSON values to write with it, such as versions or the data used; `load` ignores them.
        Raises `OSError` if the file cannot be written, and `TypeError` or `ValueError` if `provenance` is not JSON.
        """
        header = {"format": "fim_compression", "schema_version": SCHEMA_VERSION}
        write_json(path, header | {"provenance": provenance} | self.to_dict())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises `OSError` if the file cannot be read, and `InvalidFileError` if it is damaged, not such a file, or from
        a newer version of fim-lora.
        """
        return read_json(path, "fim_compression", SCHEMA_VERSION, cls.from_dict, "Compress again.")

    def __str__(self) -> str:
        return f"{format_rows(self.rows())}\n\n{self.criterion}\n\n{format_grid(self.ranks)}"

    __repr__ = __str__


def _integers(content: Mapping[str, Any], at_least: int) -> dict[str, int]:
    return {require_layer_name(name): require_integer(value, at_least) for name, value in content.items()}
