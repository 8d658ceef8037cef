"""`FimDiagonals`: the eFIM diagonal of every element of some weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike

import torch
from torch import Tensor

from ..runtime.checked_json import require_layer_name
from ..runtime.checked_safetensors import read_safetensors, require_digits, write_safetensors

SCHEMA_VERSION = 1
_FORMAT = "fim_diagonals"


class FimDiagonals(Mapping[str, Tensor]):
    """A mapping from layer name, as in the base model, to the eFIM diagonal of the layer's weight.

    A diagonal has the shape of the weight. Its unit is squared loss per squared unit of weight.

    Args:
        diagonals: Layer name to diagonal, in float32 or float64 and on any device, with at least one element each.
        num_batches: Number of calibration batches.
        num_examples: Number of examples that the mean is over: the largest over the layers.
        num_skipped_batches: Batches that were skipped, for some layers or for all, because the loss or a gradient was
            not finite.

    Raises:
        TypeError: If a diagonal is not a tensor in float32 or float64.
        ValueError: If there is no diagonal, a diagonal is empty, an element is negative or not finite, a name cannot
            be that of a layer, or a number is negative.
    """

    def __init__(
        self,
        diagonals: Mapping[str, Tensor],
        num_batches: int = 0,
        num_examples: int = 0,
        num_skipped_batches: int = 0,
    ) -> None:
        if not diagonals:
            raise ValueError("There is no diagonal: pass one for at least one layer.")
        for name, diagonal in diagonals.items():
            require_layer_name(name)
            _require_diagonal(f"The diagonal of layer {name!r}", diagonal)
        if min(num_batches, num_examples, num_skipped_batches) < 0:
            raise ValueError(
                f"num_batches, num_examples and num_skipped_batches must not be negative, got {num_batches}, "
                f"{num_examples} and {num_skipped_batches}."
            )
        self._diagonals = dict(diagonals)
        self.num_batches = num_batches
        self.num_examples = num_examples
        self.num_skipped_batches = num_skipped_batches

    def __getitem__(self, name: str) -> Tensor:
        return self._diagonals[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._diagonals)

    def __len__(self) -> int:
        return len(self._diagonals)

    def __repr__(self) -> str:
        entries = sum(diagonal.numel() for diagonal in self.values())
        counts = f"{self.num_batches} batches, {self.num_examples} examples"
        return f"FimDiagonals({len(self)} layers, {entries:,} elements, {counts})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FimDiagonals):
            return NotImplemented
        return (
            self._numbers() == other._numbers()
            and self.keys() == other.keys()
            and all(torch.equal(diagonal, other[name]) for name, diagonal in self.items())
        )

    __hash__ = None  # type: ignore[assignment]  # compared by value

    def save(self, path: str | PathLike[str]) -> None:
        """Write the diagonals as safetensors, completely or not at all. Raises `OSError` if that is not possible."""
        write_safetensors(path, self, _FORMAT, SCHEMA_VERSION, self._numbers())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> FimDiagonals:
        """Read what `save` wrote, to the CPU.

        Raises `OSError` if the file cannot be read, and `InvalidFileError` if it is damaged, not a file of diagonals,
        or from a newer version of fim-lora.
        """
        return read_safetensors(path, _FORMAT, SCHEMA_VERSION, cls._parsed, "Compute the diagonals again.")

    @classmethod
    def _parsed(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> FimDiagonals:
        fields = ("num_batches", "num_examples", "num_skipped_batches")
        return cls(tensors, *(require_digits(metadata[name], 0) for name in fields))

    def _numbers(self) -> dict[str, int]:
        return {
            "num_batches": self.num_batches,
            "num_examples": self.num_examples,
            "num_skipped_batches": self.num_skipped_batches,
        }


def _require_diagonal(what: str, diagonal: Tensor) -> None:
    if not isinstance(diagonal, Tensor) or diagonal.dtype not in (torch.float32, torch.float64):
        found = diagonal.dtype if isinstance(diagonal, Tensor) else type(diagonal).__name__
        raise TypeError(f"{what} must be a tensor in float32 or float64, got {found}.")
    if diagonal.numel() == 0:
        raise ValueError(f"{what} has shape {tuple(diagonal.shape)}; it must have at least one element.")
    low, high = diagonal.aminmax()
    if not (low >= 0 and high < torch.inf):  # NaN fails, too
        raise ValueError(f"{what} must be finite and not negative, its elements are from {low} to {high}.")
