"""The size curve."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from fim_lora.ranks.size_curve import SizeCurve
from fim_lora.report.size_curve import draw_size_curve, size_curve_figure
from helpers.spectra import LAYERS, compression, spectrum


def figure_of(whole, chosen=None, measured=()):
    return size_curve_figure(SizeCurve.of(whole, chosen, measured), chosen)


def line_of(axes, label):
    """The points (N × 2) of the line with this label, or with a label that begins so."""
    [line] = [line for line in axes.lines if str(line.get_label()).startswith(label)]
    return np.asarray(line.get_xydata(), dtype=float)


def test_the_curve_is_the_prediction_for_every_size():
    whole = spectrum()
    [axes] = figure_of(whole).axes
    points = line_of(axes, "predicted, ± standard error")
    assert len(points) > 20
    [band] = axes.collections
    edges = band.get_paths()[0].vertices
    for parameters, increase in points:
        kept = whole.keep(int(parameters))
        assert whole.parameters_of(kept) == parameters
        # The gradient of one gate on everything that is dropped, for each example's summed loss, and its expansion.
        total = sum(np.delete(layer.gates, kept[name], axis=1).sum(1).astype(float) for name, layer in whole.items())
        by_example = total**2 / 2 - total / np.sqrt(whole.terms_per_example)
        assert increase == pytest.approx(by_example.mean(), abs=1e-6)
        error = by_example.std(ddof=1) / np.sqrt(len(by_example))
        at_this_size = edges[np.isclose(edges[:, 0], parameters), 1]
        assert (at_this_size.min(), at_this_size.max()) == pytest.approx(
            (increase - error, increase + error), abs=1e-6
        )
    assert points[:, 0].max() == whole.num_parameters
    assert points[-1, 1] == 0


def test_the_chosen_size_and_all_measured_losses_are_marked():
    whole = spectrum()
    chosen = compression(whole, 0.25, loss_before=2.0, loss_after=2.5)
    figure = figure_of(whole, chosen=chosen, measured=[(500, 1.25), (1200, 0.125)])
    [axes] = figure.axes
    assert set(line_of(axes, "chosen size")[:, 0]) == {chosen.num_parameters}
    expected = sorted([(500, 1.25), (1200, 0.125), (chosen.num_parameters, 0.5)])
    assert line_of(axes, "measured").tolist() == [list(point) for point in expected]
    left, right = axes.get_xlim()
    assert left < 500
    assert right > whole.num_parameters
    texts = [text.get_text() for text in figure.texts]
    assert texts[0] == "Size of the adapter and increase of the loss"
    assert f"{chosen.num_parameters:,} parameters" in texts[2]
    assert "measured +0.5" in texts[2]


def test_without_data_the_curve_is_the_dropped_norm_and_says_so():
    whole = spectrum(examples=0)
    figure = figure_of(whole)
    [axes] = figure.axes
    assert "without data" in figure.texts[0].get_text()
    assert axes.get_ylabel() == "dropped share of the squared norm of ΔW"
    total = sum(layer.squared_norms.sum() for layer in whole.values())
    for parameters, dropped in line_of(axes, "without data"):
        kept = whole.keep(int(parameters))
        norm = sum(np.delete(layer.squared_norms, kept[name]).sum() for name, layer in whole.items())
        assert dropped == pytest.approx(norm / total, abs=1e-6)


def test_without_data_measured_losses_have_their_own_axes():
    whole = spectrum(examples=0)
    chosen = compression(whole, 0.5, loss_before=1.0, loss_after=1.5)
    norm, loss = figure_of(whole, chosen=chosen, measured=[(700, 2.0)]).axes
    assert norm.get_ylabel() != loss.get_ylabel() == "increase of the loss"
    assert line_of(loss, "measured").tolist() == [[700, 2.0], [chosen.num_parameters, 0.5]]
    assert norm.get_xlim() == loss.get_xlim()
    assert "predicted" not in [line.get_label() for line in loss.lines]


def test_no_rank_of_the_curve_is_above_the_cap():
    whole = spectrum()
    chosen = compression(whole, 0.25, r_max=2)
    [axes] = figure_of(whole, chosen=chosen).axes
    assert line_of(axes, "predicted")[:, 0].max() == whole.num_parameters / 2


SPECTRA = {
    "with data": spectrum(),
    "without data": spectrum(examples=0),
    "one example": spectrum(examples=1),
    "one component": spectrum(["lm_head"], rank=1),
    "untrained": spectrum(examples=0, norm=0.0),
    "many layers": spectrum([f"model.layers.{depth}.q_proj" for depth in range(300)], rank=16, shape=(40_960, 81_920)),
}


def drawn_texts(figure):
    """All texts; matplotlib also has labels for ticks outside of the limits, which are not drawn."""
    yield from figure.texts
    for axes in figure.axes:
        yield from (axes.xaxis.label, axes.yaxis.label, *axes.get_legend().get_texts())
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()
            ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
            yield from (label for place, label in ticks if low <= place <= high)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("with_chosen", [False, True])
def test_no_texts_overlap(name, with_chosen, tmp_path):
    whole = SPECTRA[name]
    options = {}
    if with_chosen:
        share = 1 if name == "one component" else 0.5
        options["chosen"] = compression(whole, share, loss_before=1.23456, loss_after=1.3)
        options["measured"] = [(whole.num_parameters // part, 0.1 * part) for part in (2, 16)]
    figure = figure_of(whole, **options)
    figure.canvas.draw()
    boxes = [(text.get_text(), text.get_window_extent()) for text in drawn_texts(figure) if text.get_text()]
    assert len(boxes) > 6
    for number, (text, box) in enumerate(boxes):
        for other, other_box in boxes[number + 1 :]:
            assert not box.overlaps(other_box), (text, other)
    figure.write(tmp_path / "curve.png")
    height, width = imread(tmp_path / "curve.png").shape[:2]
    assert 800 <= width <= 1100
    assert 600 <= height <= 1400


def test_a_compression_of_another_adapter_is_refused():
    with pytest.raises(ValueError, match="has other layers or ranks than the spectrum"):
        SizeCurve.of(spectrum(), compression(spectrum(LAYERS[:3])))


def test_plot_returns_the_figure_and_writes_it(tmp_path):
    whole = spectrum()
    chosen = compression(whole)
    for plot in (whole.plot, chosen.plot, lambda path=None: whole.plot(path, chosen=chosen)):
        assert plot()._repr_png_().startswith(b"\x89PNG")  # what a notebook shows
        assert plot(tmp_path / "picture.svg") is not None
        assert "<svg" in (tmp_path / "picture.svg").read_text()
        (tmp_path / "picture.svg").unlink()


def test_pyplot_is_not_used(tmp_path):
    from matplotlib import _pylab_helpers

    draw_size_curve(SizeCurve.of(spectrum()), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").exists()
    assert not _pylab_helpers.Gcf.figs


def test_without_matplotlib_everything_but_the_pictures_works():
    code = """
import sys
sys.modules["matplotlib"] = None
sys.path.insert(0, {tests!r})
from peft import LoraConfig
from fim_lora import FimScores, LayerScore, RankAllocation
from helpers.spectra import compression, spectrum
whole = spectrum()
allocation = RankAllocation.from_scores(FimScores({{"head": LayerScore(1.0, None, 1, (8, 8))}}), LoraConfig())
for value in (whole, compression(whole), allocation):
    assert str(value) and value._repr_html_()
    try:
        value.plot()
    except ImportError as error:
        print(error)
"""
    tests = str(Path(__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-c", code.format(tests=tests)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    expected = "Pictures need matplotlib, which is not installed: run pip install matplotlib."
    assert result.stdout.splitlines() == [expected] * 3
