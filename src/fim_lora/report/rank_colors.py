"""The color of a rank, the same in pictures, notebooks and reports; without matplotlib."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Color = tuple[float, float, float]
"""Red, green and blue, from 0 to 1."""

# YlGnBu of ColorBrewer without its lightest color, so that no rank looks like a layer without an adapter.
# Its lightness falls all the way, so the order of the ranks survives gray printing and every form of color blindness.
_PALETTE = ("#edf8b1", "#c7e9b4", "#7fcdbb", "#41b6c4", "#1d91c0", "#225ea8", "#253494", "#081d58")
_STOPS = np.array([[int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)] for color in _PALETTE])

NO_ADAPTER: Color = (1.0, 1.0, 1.0)
"""Color of rank 0."""

# If the ratio of the largest to the smallest rank is at least this, equal steps of color are equal factors of rank.
_LOGARITHMIC_FROM = 4


@dataclass(frozen=True)
class RankScale:
    """Ranks from `smallest` to `largest`, both at least 1, as positions from 0 to 1 and as colors: more is darker."""

    smallest: float
    largest: float

    @classmethod
    def of(cls, ranks: Iterable[float]) -> RankScale:
        """The scale of all these ranks that are not 0."""
        adapted = [rank for rank in ranks if rank > 0] or [1]
        return cls(min(adapted), max(adapted))

    @property
    def is_logarithmic(self) -> bool:
        """Whether equal steps are equal factors."""
        return self.largest >= _LOGARITHMIC_FROM * self.smallest

    def position(self, ranks: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """0 for the smallest rank, 1 for the largest one, and one half for all if there is only one."""
        values = np.asarray(ranks, np.float64)
        if self.smallest == self.largest:
            return np.full(values.shape, 0.5)
        low, high = self._bounds()
        transformed = np.log(np.maximum(values, 1e-9)) if self.is_logarithmic else values
        return np.clip((transformed - low) / (high - low), 0, 1)

    def ticks(self, number: int) -> list[int]:
        """Up to `number` whole ranks from the smallest to the largest one, evenly spread over the colors."""
        if self.smallest == self.largest:
            return [round(self.smallest)]
        spread = np.linspace(*self._bounds(), max(number, 2))
        values = np.exp(spread) if self.is_logarithmic else spread
        return sorted({round(float(value)) for value in values})

    def colors(self, ranks: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Red, green and blue of each rank, as a last dimension of three."""
        return gradient(self.position(ranks))

    def color(self, rank: float) -> Color:
        """The color of one rank; white for 0."""
        if rank == 0:
            return NO_ADAPTER
        red, green, blue = self.colors(rank).tolist()
        return red, green, blue

    def _bounds(self) -> tuple[float, float]:
        bounds = np.array([self.smallest, self.largest], np.float64)
        low, high = (np.log(bounds) if self.is_logarithmic else bounds).tolist()
        return low, high


def gradient(positions: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The colors of positions from 0 to 1, as a last dimension of three."""
    positions, stops = np.asarray(positions, np.float64), np.linspace(0, 1, len(_STOPS))
    return np.stack([np.interp(positions, stops, channel) for channel in _STOPS.T], axis=-1)


def text_color(background: Color) -> str:
    """Black or white, whichever has the higher contrast by WCAG 2."""
    color = np.asarray(background)
    linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ np.array([0.2126, 0.7152, 0.0722]))
    contrast_with_white, contrast_with_black = 1.05 / (luminance + 0.05), (luminance + 0.05) / 0.05
    return "white" if contrast_with_white > contrast_with_black else "black"


def hexadecimal(color: Color) -> str:
    """The color as HTML writes it, such as `#1d91c0`."""
    return "#" + "".join(f"{round(255 * part):02x}" for part in color)
