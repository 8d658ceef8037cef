"""The picture of a comparison."""

import numpy as np
import pytest
from matplotlib.image import imread

from fim_lora.ranks.comparison import RankComparison
from fim_lora.report import comparison_picture
from fim_lora.report.comparison_picture import comparison_figure, draw_comparison

FIRST = {f"model.layers.{depth}.self_attn.{kind}_proj": depth + 1 for depth in range(4) for kind in "qv"}
SECOND = {name: 0 if ".1." in name else 8 for name in FIRST if ".3." not in name} | {"lm_head": 5}


def lines(figure):
    """Title of each panel to the depths, and the ranks of both lines."""
    panels = {axes.get_title(): axes.get_lines() for axes in figure.axes}
    return {title: [line.get_xydata() for line in found] for title, found in panels.items()}


def test_every_rank_of_both_results_is_drawn_at_its_depth():
    drawn = lines(comparison_figure(RankComparison(FIRST, SECOND), ("a", "b")))
    assert list(drawn) == ["q_proj", "v_proj", "lm_head"]
    for kind in ("q_proj", "v_proj"):
        first, second = drawn[kind]
        np.testing.assert_array_equal(first, [[0, 1], [1, 2], [2, 3], [3, 4]])
        np.testing.assert_array_equal(second, [[0, 8], [1, 0], [2, 8], [3, np.nan]])
    np.testing.assert_array_equal(drawn["lm_head"], [[[0, np.nan]], [[0, 5]]])


@pytest.mark.parametrize("ranks", [FIRST, SECOND, {"lm_head": 1}], ids=["without 0", "with 0", "one layer"])
def test_every_drawn_rank_is_inside_of_its_panel(ranks):
    figure = comparison_figure(RankComparison(ranks, {"lm_head": 70}), ("a", "b"))
    for axes in figure.axes:
        low, high = axes.get_ylim()
        drawn = np.concatenate([line.get_ydata() for line in axes.get_lines()])
        assert low < np.nanmin(drawn) <= np.nanmax(drawn) < high


def test_the_picture_has_a_sensible_size_and_the_names(tmp_path):
    path = tmp_path / "ranks.png"
    draw_comparison(RankComparison(FIRST, SECOND), ("runs/$first$", "second"), path)
    height, width = imread(path).shape[:2]
    assert 600 <= width <= 1000  # two panels side by side
    assert 500 <= height <= 1000
    draw_comparison(RankComparison(FIRST, SECOND), ("runs/$first$", "second"), tmp_path / "ranks.svg")
    assert "runs/$first$" in (tmp_path / "ranks.svg").read_text()


def test_too_many_kinds_and_nothing_at_all_are_refused(monkeypatch):
    monkeypatch.setattr(comparison_picture, "_MAX_PANELS", 2)
    with pytest.raises(ValueError, match="There are 3 kinds of layers, more than the 2"):
        comparison_figure(RankComparison(FIRST, SECOND), ("a", "b"))
    with pytest.raises(ValueError, match="no layers"):
        comparison_figure(RankComparison({}, {}), ("a", "b"))
