"""Mean and variance of a stream of numbers in constant memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass
class RunningMoments:
    """Count, mean and sum of squared deviations, in float64.

    Attributes:
        count: Numbers seen.
        mean: Their mean.
        deviation: Sum of their squared deviations from the mean.
    """

    count: int = 0
    mean: float = 0.0
    deviation: float = 0.0

    def add(self, values: npt.NDArray[np.float64]) -> None:
        """Take in more numbers.

        Args:
            values: The numbers (n), n > 0.
        """
        mean = float(values.mean())
        self.merge(RunningMoments(len(values), mean, float(np.square(values - mean).sum())))

    def merge(self, other: RunningMoments) -> None:
        """Take in what another stream has seen, by the update of Chan, Golub and LeVeque (1979), equation 2.1.

        Args:
            other: The moments of the other stream.
        """
        total = self.count + other.count
        if total == 0:
            return
        difference = other.mean - self.mean
        self.deviation += other.deviation + difference**2 * self.count * other.count / total
        self.mean += difference * other.count / total
        self.count = total

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
        """Standard error of the mean; `None` below two numbers, where it is not known."""
        if self.count < 2:
            return None
        return math.sqrt(self.deviation / (self.count - 1) / self.count)
