"""The rank map."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.image import imread
from peft import LoraConfig

from fim_lora import FimConfig, FimScores, LayerScore, RankAllocation
from fim_lora.report import picture
from fim_lora.report.rank_map import _text_color, _ticks, draw_rank_map, rank_map_figure
from helpers.proportional import proportional
from helpers.spectra import compression, spectrum

LLAMA_KINDS = [f"self_attn.{kind}_proj" for kind in "qkvo"] + [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]
T5_ATTENTION = [f"0.SelfAttention.{kind}" for kind in "qkvo"]
T5_CROSS_ATTENTION = [f"1.EncDecAttention.{kind}" for kind in "qkvo"]
LLAMA_32 = [f"model.layers.{depth}.{kind}" for depth in range(32) for kind in LLAMA_KINDS]
T5 = [
    *[f"encoder.block.{depth}.layer.{kind}" for depth in range(12) for kind in [*T5_ATTENTION, "1.DenseReluDense.wo"]],
    *[f"decoder.block.{depth}.layer.{kind}" for depth in range(8) for kind in [*T5_ATTENTION, *T5_CROSS_ATTENTION]],
    "lm_head",
]


def allocation_of(names, spread=1.0, **options):
    numbers = np.random.default_rng(0).normal(size=len(names))
    scores = {
        name: LayerScore(float(np.exp(spread * number)), 0.1, 32, (64, 64))
        for name, number in zip(names, numbers, strict=True)
    }
    config = LoraConfig(r=8, init_lora_weights="fim", fim_config=proportional(**options))
    return RankAllocation.from_scores(FimScores(scores, num_batches=8), config)


@pytest.mark.parametrize(
    ("names", "options", "least", "most"),
    [
        (LLAMA_32, {}, (600, 1200), (1000, 1800)),
        (T5, {}, (1200, 600), (2400, 1100)),
        (["model.layers.0.self_attn.q_proj"], {}, (250, 250), (700, 700)),
        (["lm_head"], {}, (250, 250), (700, 700)),
        (LLAMA_32[:14], {"r_min": 8, "r_max": 8}, (600, 350), (1000, 800)),
        (LLAMA_32[:-3], {"budget": "parameters", "r_max": 60}, (600, 1200), (1000, 1800)),
    ],
    ids=["32 × 7", "two stacks", "one layer", "no depth", "equal ranks", "empty cells"],
)
def test_the_map_is_a_picture_of_sensible_size(tmp_path, names, options, least, most):
    path = tmp_path / "map.png"
    draw_rank_map(allocation_of(names, **options), path)
    height, width = imread(path).shape[:2]
    assert least[0] <= width <= most[0]
    assert least[1] <= height <= most[1]


def test_a_map_of_very_many_layers_fits_the_renderer(tmp_path, monkeypatch):
    monkeypatch.setattr(picture, "_MAX_DOTS", 1000)
    draw_rank_map(allocation_of([f"layers.{depth}.q" for depth in range(100)]), tmp_path / "map.png")
    assert 900 <= imread(tmp_path / "map.png").shape[0] <= 1050


def test_every_rank_is_written_in_the_picture(tmp_path):
    allocation = allocation_of(LLAMA_32)
    draw_rank_map(allocation, tmp_path / "map.svg")
    assert (tmp_path / "map.svg").read_text().count("<!-- ") >= len(allocation.ranks)


def test_the_map_of_a_compression_has_its_ranks_and_says_what_was_kept(tmp_path):
    chosen = replace(compression(spectrum(), 0.25, r_max=3), criterion=r"$\frac$ of $x$")
    figure = rank_map_figure(chosen)
    [title] = [text.get_text() for text in figure.texts if "kept" in text.get_text()]
    assert title.splitlines() == [
        "LoRA ranks after the compression, keep = 0.25, r_max = 3",
        f"parameters: {chosen.num_parameters:,} of {chosen.num_parameters_before:,} kept ({chosen.share:.1%})",
        r"\$\frac\$ of \$x\$",
    ]
    cells = [int(text.get_text()) for axes in figure.axes[:1] for text in axes.texts]
    assert sorted(cells) == sorted(chosen.ranks.values())
    assert 0 in cells
    assert "white: no adapter" in [text.get_text() for text in figure.texts]
    draw_rank_map(chosen, tmp_path / "map.png")
    assert imread(tmp_path / "map.png").size > 0


def test_nothing_to_draw_is_refused(tmp_path):
    empty = RankAllocation({}, {}, FimScores({}), FimConfig(), 8, 8, False, 0, 0)
    with pytest.raises(ValueError, match="no layers"):
        draw_rank_map(empty, tmp_path / "map.png")


def test_pyplot_is_not_used(tmp_path):
    from matplotlib import _pylab_helpers

    draw_rank_map(allocation_of(LLAMA_32[:7]), tmp_path / "map.png")
    assert not _pylab_helpers.Gcf.figs


def test_text_contrasts_with_its_cell():
    assert _text_color(np.array([0.27, 0.0, 0.33])) == "white"
    assert _text_color(np.array([0.99, 0.91, 0.14])) == "black"


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 3.0])
def test_ticks_are_whole_ranks_from_the_smallest_to_the_largest(spread):
    from fim_lora.report.rank_map import _norm

    allocation = allocation_of(LLAMA_32, spread)
    ticks = _ticks(_norm(allocation), allocation, 7)
    assert ticks[0] == min(allocation.ranks.values())
    assert ticks[-1] == max(allocation.ranks.values())
    assert all(isinstance(tick, int) for tick in ticks)
