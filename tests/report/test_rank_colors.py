"""The colors of ranks."""

import numpy as np
import pytest

from fim_lora.report.rank_colors import RankScale, gradient, hexadecimal, text_color


def luminance(colors):
    """Relative luminance by WCAG 2, of red, green and blue in the last dimension."""
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])


def test_more_is_darker_also_in_gray():
    """A gray printer, and eyes that see fewer colors, keep the lightness."""
    values = luminance(gradient(np.linspace(0, 1, 200)))
    assert (np.diff(values) < 0).all()
    assert values[0] < 0.92  # rank 0 is white
    assert values[-1] < 0.02


def test_neighbors_on_the_scale_are_equally_far_apart_in_gray():
    values = luminance(gradient(np.linspace(0, 1, 8))) ** (1 / 3)
    steps = -np.diff(values)
    assert steps.min() > 0.3 * steps.max()


def test_the_text_of_every_cell_has_the_contrast_that_wcag_asks_for():
    for color in gradient(np.linspace(0, 1, 100)):
        background = luminance(color)
        other = luminance(np.ones(3)) if text_color(tuple(color)) == "white" else 0.0
        low, high = sorted((background, other))
        assert (high + 0.05) / (low + 0.05) >= 4.5


@pytest.mark.parametrize("ranks", [[1, 32], [8, 8], [7, 8], [0, 5, 6], [2, 100, 3], [0, 0]])
def test_ticks_are_whole_ranks_from_the_smallest_to_the_largest(ranks):
    scale = RankScale.of(ranks)
    ticks = scale.ticks(7)
    adapted = [rank for rank in ranks if rank > 0] or [1]
    assert (ticks[0], ticks[-1]) == (min(adapted), max(adapted))
    assert all(isinstance(tick, int) for tick in ticks)


def test_wide_ranges_are_logarithmic():
    assert RankScale(1, 64).position([1, 8, 64]) == pytest.approx([0, 0.5, 1])
    assert RankScale(4, 6).position([4, 5, 6]) == pytest.approx([0, 0.5, 1])
    assert RankScale(8, 8).position([8]) == pytest.approx([0.5])


def test_a_layer_without_an_adapter_is_white():
    assert hexadecimal(RankScale(1, 8).color(0)) == "#ffffff"
    assert hexadecimal(RankScale(1, 8).color(1)) != "#ffffff"
