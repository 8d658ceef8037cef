"""Mean and variance of a stream of numbers in constant memory."""

from __future__ import annotations

import math
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
        """Take in more numbers, by the parallel update of Chan, Golub and LeVeque (1979), equation 2.1.

        Args:
            values: The numbers (n), n > 0.
        """
        mean = float(values.mean())
        deviation = float(np.square(values - mean).sum())
        total = self.count + len(values)
        difference = mean - self.mean
        self.deviation += deviation + difference**2 * self.count * len(values) / total
        self.mean += difference * len(values) / total
        self.count = total

    @property
    def standard_error(self) -> float | None:
        """Standard error of the mean; `None` below two numbers, where it is not known."""
        if self.count < 2:
            return None
        return math.sqrt(self.deviation / (self.count - 1) / self.count)
