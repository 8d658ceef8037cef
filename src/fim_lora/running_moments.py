"""Mean and variance of a stream of numbers in constant memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass
class RunningMoments:
    """Weighted mean, and what its standard error needs, in float64.

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

    def add(self, values: npt.NDArray[np.float64], weight: float = 1.0) -> None:
        """Take in more numbers.

        Args:
            values: The numbers (n), n > 0.
            weight: The weight of each.
        """
        count, mean = len(values), float(values.mean())
        square_deviation = weight**2 * float(np.square(values - mean).sum())
        self.merge(RunningMoments(count, count * weight, mean, count * weight**2, 0.0, square_deviation))

    def merge(self, other: RunningMoments) -> None:
        """Take in what another stream has seen, by the update of Chan, Golub and LeVeque (1979), equation 2.1.

        Args:
            other: The moments of the other stream.
        """
        if other.count == 0:
            return
        weight = self.weight + other.weight
        mean = self.mean + (other.mean - self.mean) * other.weight / weight
        mine, others = self._about(mean), other._about(mean)
        self.deviation, self.square_deviation = (a + b for a, b in zip(mine, others, strict=True))
        self.square_weight += other.square_weight
        self.count, self.weight, self.mean = self.count + other.count, weight, mean

    def _about(self, mean: float) -> tuple[float, float]:
        """`Σ w² (x - mean)` and `Σ w² (x - mean)²` about another mean."""
        shift = mean - self.mean
        return (
            self.deviation - shift * self.square_weight,
            self.square_deviation - 2 * shift * self.deviation + shift**2 * self.square_weight,
        )

    @classmethod
    def merged(cls, several: Iterable[RunningMoments]) -> RunningMoments:
        """The moments of several streams together.

        Args:
            several: Their moments, which stay as they are.

        Returns:
            New moments.
        """
        result = cls()
        for moments in several:
            result.merge(moments)
        return result

    @property
    def standard_error(self) -> float | None:
        """Standard error of the mean; `None` below two numbers, where it is not known.

        `sqrt(n / (n - 1) · Σ w² (x - mean)²) / Σ w` (Cochran 1977, for ratios); with equal weights the usual one.
        """
        if self.count < 2:
            return None
        # Rounding may leave a little less than zero.
        return math.sqrt(max(self.square_deviation, 0.0) * self.count / (self.count - 1)) / self.weight
