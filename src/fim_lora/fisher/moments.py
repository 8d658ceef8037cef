"""Mean and variance of a stream of numbers in constant memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass
class RunningMoments:
    """Weighted mean and the sums for its standard error, in float64.

    Attributes:
        count: Numbers seen, n.
        weight: Sum of their weights, `Σ w`.
        mean: `Σ w x / Σ w`.
        square_weight: `Σ w²`.
        deviation: `Σ w² (x - mean)`.
        square_deviation: `Σ w² (x - mean)²`.
    """

    count: int = 0
    weight: float = 0.0
    mean: float = 0.0
    square_weight: float = 0.0
    deviation: float = 0.0
    square_deviation: float = 0.0

    @classmethod
    def merged(cls, streams: Iterable[RunningMoments]) -> RunningMoments:
        """New moments of several streams together."""
        result = cls()
        for moments in streams:
            result.merge(moments)
        return result

    def add(self, values: npt.NDArray[np.float64], weight: float = 1.0) -> None:
        """Add n > 0 numbers, each with this weight."""
        count, mean = len(values), float(values.mean())
        square_deviation = weight**2 * float(np.square(values - mean).sum())
        self.merge(RunningMoments(count, count * weight, mean, count * weight**2, 0.0, square_deviation))

    def merge(self, other: RunningMoments) -> None:
        """Add the numbers of another stream, by the update of Chan, Golub and LeVeque (1979), equation 2.1."""
        if other.count == 0:
            return
        weight = self.weight + other.weight
        mean = self.mean + (other.mean - self.mean) * other.weight / weight
        own, added = self._deviations_from(mean), other._deviations_from(mean)
        self.deviation, self.square_deviation = (a + b for a, b in zip(own, added, strict=True))
        self.square_weight += other.square_weight
        self.count, self.weight, self.mean = self.count + other.count, weight, mean

    def _deviations_from(self, mean: float) -> tuple[float, float]:
        """`Σ w² (x - mean)` and `Σ w² (x - mean)²` with another mean."""
        shift = mean - self.mean
        return (
            self.deviation - shift * self.square_weight,
            self.square_deviation - 2 * shift * self.deviation + shift**2 * self.square_weight,
        )

    @property
    def standard_error(self) -> float | None:
        """Standard error of the mean; `None` for fewer than two numbers, for which it is not known.

        `sqrt(n / (n - 1) · Σ w² (x - mean)²) / Σ w` (Cochran 1977, for ratios); the usual one for equal weights.
        """
        if self.count < 2:
            return None
        # Rounding may give slightly less than zero.
        return math.sqrt(max(self.square_deviation, 0.0) * self.count / (self.count - 1)) / self.weight
