"""The rank map."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.image import imread
from peft import LoraConfig

from fim_lora import FimConfig, FimScores, LayerScore, RankAllocation
from fim_lora.report import picture
from fim_lora.report.rank_map import draw_rank_map, rank_map_figure
from helpers.proportional import proportional
from helpers.spectra import compression, spectrum

LLAMA_KINDS = [f"self_attn.{kind}_proj" for kind in "qkvo"] + [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]
T5_ATTENTION = [f"0.SelfAttention.{kind}" for kind in "qkvo"]
T5_CROSS_ATTENTION = [f"1.EncDecAttention.{kind}" for kind in "qkvo"]
LLAMA_32 = [f"model.layers.{depth}.{kind}" for depth in range(32) for kind in LLAMA_KINDS]
LLAMA_80 = [f"model.layers.{depth}.{kind}" for depth in range(80) for kind in LLAMA_KINDS]
T5 = [
    *[f"encoder.block.{depth}.layer.{kind}" for depth in range(12) for kind in [*T5_ATTENTION, "1.DenseReluDense.wo"]],
    *[f"decoder.block.{depth}.layer.{kind}" for depth in range(8) for kind in [*T5_ATTENTION, *T5_CROSS_ATTENTION]],
    "lm_head",
]
CONVOLUTIONS = [
    "conv1",
    *[f"layer{stage}.{block}.conv{place}" for stage in (1, 2) for block in (0, 1) for place in (1, 2)],
]


def allocation_of(names, spread=1.0, **options):
    numbers = np.random.default_rng(0).normal(size=len(names))
    scores = {
        name: LayerScore(float(np.exp(spread * number)), 0.1, 32, (64, 64))
        for name, number in zip(names, numbers, strict=True)
    }
    config = LoraConfig(r=8, init_lora_weights="fim", fim_config=proportional(**options))
    return RankAllocation.from_scores(FimScores(scores, num_batches=8), config)


MAPS = {
    "32 × 7": allocation_of(LLAMA_32),
    "80 × 7": allocation_of(LLAMA_80),
    "two stacks": allocation_of(T5),
    "convolutions": allocation_of(CONVOLUTIONS),
    "one layer": allocation_of(["model.layers.0.self_attn.q_proj"]),
    "no depth": allocation_of(["lm_head"]),
    "equal ranks": allocation_of(LLAMA_32[:14], r_min=8, r_max=8),
    "empty cells": allocation_of(LLAMA_32[:-3], budget="parameters", r_max=60),
    "dropped layers": allocation_of(LLAMA_32[:60], spread=3.0, r_min=0),
    "a very long name": allocation_of(["encoder." + "block" * 30, "$head$"]),
    "compression": compression(spectrum(), 0.25, r_max=3),
    "compression of one layer": compression(spectrum(["lm_head"], rank=2), 0.5),
}


def cell_texts(figure):
    """The numbers of all panels, row by row; the last axes are those of the color bar."""
    return [text.get_text() for axes in figure.axes[:-1] for text in axes.texts]


def header(figure):
    return [text.get_text() for text in figure.texts if text.get_verticalalignment() == "top"]


def notes(figure):
    return [text.get_text() for text in figure.texts if text.get_color() == "0.3"]


@pytest.mark.parametrize("name", MAPS)
def test_texts_neither_overlap_nor_become_unreadable_at_400_pixels(name):
    figure = rank_map_figure(
        MAPS[name], model="meta-llama/A-Model-Of-Two-Hundred-Billion-Parameters", data="a b " * 30
    )
    figure.canvas.draw()
    texts = list(figure.texts)
    for axes in figure.axes:
        texts += [*axes.texts, axes.title, *axes.get_xticklabels(), *axes.get_yticklabels()]
    texts = [text for text in texts if text.get_text()]
    assert len(texts) > 5
    left, bottom, right, top = np.array([text.get_window_extent().extents for text in texts]).T[:, :, None]
    overlap = (left < right.T) & (right > left.T) & (bottom < top.T) & (top > bottom.T)
    pairs = [(texts[one].get_text(), texts[two].get_text()) for one, two in np.argwhere(np.triu(overlap, 1))]
    assert pairs == []
    inches = figure.get_tightbbox().width + 2 * picture.MARGIN
    pixels = min(text.get_fontsize() for text in texts) / 72 * 400 / inches
    assert pixels >= (9 if name != "two stacks" else 8)


@pytest.mark.parametrize("name", MAPS)
def test_the_map_is_a_picture_of_sensible_size(tmp_path, name):
    draw_rank_map(MAPS[name], tmp_path / "map.png")
    height, width = imread(tmp_path / "map.png").shape[:2]
    assert 350 <= width <= 900
    assert 200 <= height <= 1700


def test_the_title_names_model_data_and_size():
    allocation = allocation_of(LLAMA_32[:14])
    lines = header(rank_map_figure(allocation, model="owner/model", data="data.jsonl"))
    assert lines[:4] == [
        "LoRA rank of every layer",
        "owner/model",
        "data.jsonl: 32 examples in 8 batches",
        "112 ranks, as with uniform rank 8",
    ]
    assert header(rank_map_figure(allocation))[1] == "32 examples in 8 batches"


def test_every_rank_is_written_at_its_place():
    allocation = MAPS["32 × 7"]
    figure = rank_map_figure(allocation)
    panel, _ = figure.axes
    assert [label.get_text() for label in panel.get_xticklabels()] == [kind.split(".")[1] for kind in LLAMA_KINDS]
    assert [label.get_text() for label in panel.get_yticklabels()] == [str(depth) for depth in range(32)]
    shown = {text.get_position(): text.get_text() for text in panel.texts}
    expected = {
        (column + 0.5, depth + 0.5): str(allocation.ranks[f"model.layers.{depth}.{kind}"])
        for depth in range(32)
        for column, kind in enumerate(LLAMA_KINDS)
    }
    assert shown == expected


def test_bold_are_the_ranks_above_the_uniform_one():
    figure = rank_map_figure(MAPS["32 × 7"])
    ranks = {text.get_weight(): set() for text in figure.axes[0].texts}
    for text in figure.axes[0].texts:
        ranks[text.get_weight()].add(int(text.get_text()))
    assert max(ranks["normal"]) <= 8 < min(ranks["bold"])
    assert "bold: above uniform rank 8" in notes(figure)


def test_the_color_bar_is_as_high_as_the_map_and_marks_the_uniform_rank_and_the_largest():
    for name in ("32 × 7", "two stacks", "convolutions"):
        figure = rank_map_figure(MAPS[name])
        *panels, bar = [axes.get_position() for axes in figure.axes]
        assert bar.y0 == pytest.approx(min(panel.y0 for panel in panels))
        assert bar.y1 == pytest.approx(max(panel.y1 for panel in panels))
    figure = rank_map_figure(MAPS["32 × 7"])
    axes = figure.axes[-1]
    place_of = dict(zip([label.get_text() for label in axes.get_yticklabels()], axes.get_yticks(), strict=True))
    ranks = MAPS["32 × 7"].ranks.values()
    assert (min(ranks), max(ranks)) == (1, 32)
    assert place_of["1"] == 0
    assert place_of["32 r_max"] == 1
    assert place_of["8 uniform"] == pytest.approx(np.log(8) / np.log(32))
    assert {line.get_ydata()[0] for line in axes.lines} == {place_of["32 r_max"], place_of["8 uniform"]}


def test_a_bound_that_no_layer_reaches_is_named_below_the_map():
    figure = rank_map_figure(allocation_of(LLAMA_32, spread=0.1, r_max=100))
    assert "r_max = 100 is not reached" in notes(figure)
    assert not any("r_max" in label.get_text() for label in figure.axes[-1].get_yticklabels())


def test_many_depths_are_shown_as_means_of_consecutive_ones():
    allocation = MAPS["80 × 7"]
    figure = rank_map_figure(allocation)
    ranks = np.array(list(allocation.ranks.values())).reshape(40, 2, 7).mean(1)
    shown = np.array([int(text) for text in cell_texts(figure)]).reshape(40, 7)
    assert np.abs(shown - ranks).max() <= 0.5
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()][:2] == ["0–1", "2–3"]
    assert "a row of several depths: mean rank" in notes(figure)


def test_layers_without_a_depth_are_a_list_of_names():
    names = ["features.0", "features.3", "classifier.1"]
    allocation = allocation_of(names)
    figure = rank_map_figure(allocation)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == names
    assert cell_texts(figure) == [str(allocation.ranks[name]) for name in names]


def test_the_map_of_a_compression_has_its_ranks_and_says_what_was_kept():
    chosen = replace(compression(spectrum(), 0.25, r_max=2), criterion=r"$\frac$ of $x$")
    figure = rank_map_figure(chosen, model="small of model", data="data")
    assert header(figure)[:5] == [
        "LoRA rank of every layer, compressed",
        "small of model",
        r"data: \$\frac\$ of \$x\$",
        f"{chosen.num_parameters:,} of {chosen.num_parameters_before:,} parameters kept ({chosen.share:.1%})",
        "before: rank 4 in all layers",
    ]
    assert sorted(map(int, cell_texts(figure))) == sorted(chosen.ranks.values())
    assert 0 in chosen.ranks.values()
    assert "white: no adapter" in notes(figure)
    assert "2 r_max" in [label.get_text() for label in figure.axes[-1].get_yticklabels()]
    assert "1 uniform" in [label.get_text() for label in figure.axes[-1].get_yticklabels()]


def test_no_rank_is_bold_that_looks_equal_to_the_uniform_one():
    whole = compression(spectrum(), 0.5)
    # One layer costs next to nothing, and the others have rank 2.
    costs = dict.fromkeys(whole.ranks, 10_000) | {"model.layers.0.q_proj": 1}
    ranks = dict.fromkeys(whole.ranks, 2) | {"model.layers.0.q_proj": 1}
    figure = rank_map_figure(replace(whole, ranks=ranks, parameters_per_rank=costs))
    assert "2 uniform" in [label.get_text() for label in figure.axes[-1].get_yticklabels()]
    assert {text.get_weight() for text in figure.axes[0].texts} == {"normal"}


def test_unequal_ranks_before_a_compression_are_shown_too():
    whole = compression(spectrum(), 0.5)
    chosen = replace(whole, ranks_before={name: 4 + place for place, name in enumerate(whole.ranks)})
    figure = rank_map_figure(chosen)
    expected = [f"{rank}/{chosen.ranks_before[name]}" for name, rank in chosen.ranks.items()]
    assert cell_texts(figure) == expected
    assert f"before: ranks 4 to {3 + len(chosen.ranks)}" in header(figure)
    assert "after/before" in notes(figure)


def test_a_map_of_very_many_layers_fits_the_renderer(tmp_path, monkeypatch):
    monkeypatch.setattr(picture, "_MAX_DOTS", 1000)
    draw_rank_map(allocation_of([f"layer{place}" for place in range(100)]), tmp_path / "map.png")
    assert 900 <= imread(tmp_path / "map.png").shape[0] <= 1050


def test_nothing_to_draw_is_refused(tmp_path):
    empty = RankAllocation({}, {}, FimScores({}), FimConfig(), 8, 8, False, 0, 0)
    with pytest.raises(ValueError, match="no layers"):
        draw_rank_map(empty, tmp_path / "map.png")


def test_plot_returns_the_figure_and_writes_it(tmp_path):
    allocation = MAPS["convolutions"]
    assert allocation.plot()._repr_png_().startswith(b"\x89PNG")  # what a notebook shows
    figure = allocation.plot(tmp_path / "map.svg")
    assert sorted(map(int, cell_texts(figure))) == sorted(allocation.ranks.values())
    assert "<svg" in (tmp_path / "map.svg").read_text()


def test_pyplot_is_not_used(tmp_path):
    from matplotlib import _pylab_helpers

    draw_rank_map(allocation_of(LLAMA_32[:7]), tmp_path / "map.png")
    assert not _pylab_helpers.Gcf.figs
