"""Running means and standard errors."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fim_lora.fisher.moments import RunningMoments


@given(st.lists(st.tuples(st.floats(0, 1e3), st.integers(1, 9)), min_size=2, max_size=9), st.integers(0, 9))
def test_running_moments_with_weights(pairs, split):
    values, weights = (np.array(column, dtype=np.float64) for column in zip(*pairs, strict=True))
    parts = [RunningMoments(), RunningMoments()]
    for place, (value, weight) in enumerate(pairs):
        parts[place < split].add(np.array([value]), weight)
    moments = RunningMoments.merged(parts)
    mean = np.average(values, weights=weights)
    assert moments.mean == pytest.approx(mean, abs=1e-9)
    count = len(values)
    expected = math.sqrt(count / (count - 1) * np.sum(weights**2 * (values - mean) ** 2)) / weights.sum()
    assert moments.standard_error == pytest.approx(expected, rel=1e-6, abs=1e-5)


@given(st.lists(st.lists(st.floats(0, 1e6), min_size=1, max_size=9), min_size=1, max_size=9))
def test_running_moments_equal_those_of_all_values(batches):
    moments = RunningMoments()
    for batch in batches:
        moments.add(np.array(batch))
    values = np.concatenate(batches)
    assert moments.count == len(values)
    assert moments.mean == pytest.approx(values.mean())
    if len(values) == 1:
        assert moments.standard_error is None
    else:
        expected = values.std(ddof=1) / math.sqrt(len(values))
        assert moments.standard_error == pytest.approx(expected, rel=1e-6, abs=1e-9)
