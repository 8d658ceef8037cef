"""The bootstrap intervals over few seeds."""

import itertools

import numpy as np
import pytest

import intervals


def test_the_interval_is_that_of_all_resamples():
    values = [0.0, 1.0, 2.0, 4.0, 8.0]
    means = sorted(sum(resample) / 5 for resample in itertools.product(values, repeat=5))
    low, high = intervals.interval([values])
    # For five values, t is 2.776 and a bootstrap is too narrow by sqrt(4 / 5): 0.00096 of the resamples are below.
    assert low == pytest.approx(means[round(0.00096 * len(means))], abs=0.2)
    assert high == pytest.approx(means[-1 - round(0.00096 * len(means))], abs=0.2)
    assert intervals.interval([[1.0]]) == (1.0, 1.0)


@pytest.mark.parametrize("groups", [1, 3])
def test_intervals_of_five_seeds_cover_the_mean_as_often_as_they_say(groups, monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 4_000)
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(500):
        low, high = intervals.interval(generator.normal(size=(groups, 5)).tolist())
        covered += low <= 0 <= high
    assert 0.91 <= covered / 500 <= 0.98
