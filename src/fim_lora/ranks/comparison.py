"""`RankComparison`: the ranks of two results, layer by layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .layer_grid import LayerGrid, layer_grids


@dataclass(frozen=True)
class RankComparison:
    """Two mappings from layer name, as in the base model, to rank. Rank 0 is a layer that has lost its adapter.

    Attributes:
        first: The ranks of the first result.
        second: The ranks of the second result, which may have other layers.
    """

    first: Mapping[str, int]
    second: Mapping[str, int]

    @property
    def common(self) -> list[str]:
        """The layers of both, in the order of the first."""
        return [name for name in self.first if name in self.second]

    @property
    def only_first(self) -> list[str]:
        """The layers that only the first result has."""
        return [name for name in self.first if name not in self.second]

    @property
    def only_second(self) -> list[str]:
        """The layers that only the second result has."""
        return [name for name in self.second if name not in self.first]

    @property
    def different(self) -> list[str]:
        """The common layers whose ranks differ."""
        return [name for name in self.common if self.first[name] != self.second[name]]

    @property
    def correlation(self) -> float | None:
        """Spearman's correlation of the two ranks over the common layers; see `spearman_correlation`."""
        common = self.common
        return spearman_correlation([self.first[name] for name in common], [self.second[name] for name in common])

    @property
    def grids(self) -> list[LayerGrid]:
        """The layers of both, sorted by depth and kind. Raises `ValueError` if they are too many for a table."""
        return layer_grids(dict(self.first) | dict(self.second))


def spearman_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation ρ: Pearson's correlation of the positions of the values when they are sorted.

    Equal values share the mean of their positions. `None` if ρ is undefined, because there are fewer than two values
    or all values of one sequence are equal.

    Source: C. Spearman, "The Proof and Measurement of Association between Two Things", 1904.

    Raises:
        ValueError: If the sequences have different lengths.
    """
    if len(first) != len(second):
        raise ValueError(f"The sequences must have equal lengths, got {len(first)} and {len(second)}.")
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(np.corrcoef(_positions(first), _positions(second))[0, 1])


def _positions(values: Sequence[float]) -> np.ndarray:
    """The position of each value in sorted order, from 1; equal values get the mean of their positions."""
    _, group, sizes = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[group]
