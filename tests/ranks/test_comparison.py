"""The ranks of two results, side by side."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from fim_lora.ranks.comparison import RankComparison, spearman_correlation

VALUES = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=30)


@given(pairs=VALUES)
def test_the_correlation_is_that_of_scipy(pairs):
    first, second = zip(*pairs, strict=True)
    found = spearman_correlation(first, second)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(spearmanr(first, second).statistic, abs=1e-12)


def test_the_correlation_is_undefined_for_fewer_than_two_values():
    assert spearman_correlation([], []) is spearman_correlation([3], [4]) is None
    with pytest.raises(ValueError, match="equal lengths, got 1 and 2"):
        spearman_correlation([1], [1, 2])


def test_layers_of_one_result_are_named_and_do_not_change_the_correlation():
    common = {"a.0.q": 1, "a.1.q": 2, "a.2.q": 4}
    comparison = RankComparison(common | {"a.0.up": 9}, {"a.1.q": 3, "a.0.q": 1, "a.2.q": 0, "head": 5})
    assert comparison.common == ["a.0.q", "a.1.q", "a.2.q"]
    assert (comparison.only_first, comparison.only_second) == (["a.0.up"], ["head"])
    assert comparison.different == ["a.1.q", "a.2.q"]
    assert comparison.correlation == pytest.approx(spearmanr([1, 2, 4], [1, 3, 0]).statistic)
    cells = [name for grid in comparison.grids for name in grid.cells.values()]
    assert sorted(cells) == ["a.0.q", "a.0.up", "a.1.q", "a.2.q", "head"]
