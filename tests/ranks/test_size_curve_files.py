"""The sizes of a compression, and their file."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fim_lora.ranks.size_curve import SizeCurve
from fim_lora.runtime.checked_json import InvalidFileError
from helpers.damaged_json import HOSTILE_NAMES, truncated, with_changed_bytes, with_changed_values
from helpers.spectra import compression, spectrum

WHOLE = spectrum()
CURVE = SizeCurve.of(WHOLE, compression(WHOLE, 0.25, loss_before=2.0, loss_after=2.5), [(800, 0.125)])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("curve") / "curve.json"
    CURVE.save(path)
    return path.read_text()


@pytest.mark.parametrize("examples", [6, 1, 0])
@pytest.mark.parametrize("share", [None, 0.25])
def test_what_is_saved_is_loaded(tmp_path, examples, share):
    whole = spectrum(examples=examples)
    chosen = None if share is None else compression(whole, share, r_max=3, loss_before=1.0, loss_after=1.5)
    curve = SizeCurve.of(whole, chosen, [(900, 0.25)])
    curve.save(tmp_path / "curve.json")
    assert SizeCurve.load(tmp_path / "curve.json") == curve
    assert curve.with_data == (examples > 0)


def test_every_size_is_what_the_spectrum_keeps_of_it():
    norms = {name: layer.squared_norms.astype(float) for name, layer in WHOLE.items()}
    total = sum(norm.sum() for norm in norms.values())
    for point in CURVE.points:
        kept = WHOLE.keep(point.parameters)
        assert point.ranks == WHOLE.ranks_of(kept)
        assert point.prediction == WHOLE.predict(kept)
        dropped = sum(np.delete(norm, kept[name]).sum() for name, norm in norms.items())
        assert point.dropped_norm == pytest.approx(dropped / total, abs=1e-6)
        assert point.share == point.parameters / WHOLE.num_parameters
    assert CURVE.points[-1].ranks == WHOLE.ranks
    assert CURVE.measured == [(600, 0.5), (800, 0.125)]


def test_the_chosen_size_has_the_chosen_ranks_also_if_layers_had_to_keep_an_adapter():
    kept = WHOLE.keep(12 * 50, at_least=dict.fromkeys(WHOLE, 1))
    ranks = WHOLE.ranks_of(kept)
    assert min(WHOLE.ranks_of(WHOLE.keep(12 * 50)).values()) == 0 < min(ranks.values())
    curve = SizeCurve.of(WHOLE, replace(compression(WHOLE), ranks=ranks))
    [point] = [point for point in curve.points if point.ranks == ranks]
    assert point == WHOLE.point_of(kept)


def test_the_file_is_much_smaller_than_the_spectrum(text, tmp_path):
    layers = [f"model.layers.{depth}.{kind}" for depth in range(8) for kind in "qkvo"]
    whole = spectrum(layers, rank=16, examples=64)
    whole.save(tmp_path / "spectrum.json")
    SizeCurve.of(whole).save(tmp_path / "curve.json")
    sizes = [(tmp_path / f"{name}.json").stat().st_size for name in ("curve", "spectrum")]
    assert 10 * sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ["a", "a"]}, "appears twice"),
        ({"layers": ["a\x1b[2J"]}, "not the name of a layer"),
        ({"layers": []}, "no layers"),
        ({"points": []}, "no sizes"),
        ({"num_parameters": 1}, "do not rise"),
        ({"criterion": "\u202e"}, "not printable"),
        ({"measured": [[1, 1e400]]}, "is not a JSON number|not finite"),
    ],
)
def test_damage_is_named(text, tmp_path, change, message):
    (tmp_path / "curve.json").write_text(json.dumps(json.loads(text) | change))
    with pytest.raises(InvalidFileError, match=message):
        SizeCurve.load(tmp_path / "curve.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ranks", [1]),
        ("ranks", [-1] * 12),
        ("predicted", None),
        ("predicted", [1.0]),
        ("parameters", 10**6),
        ("parameters", 2.0),
        ("dropped_norm", "0"),
    ],
)
def test_damage_of_a_size_is_named(text, tmp_path, field, value):
    content = json.loads(text)
    content["points"][3][field] = value
    (tmp_path / "curve.json").write_text(json.dumps(content))
    with pytest.raises(InvalidFileError, match="is damaged"):
        SizeCurve.load(tmp_path / "curve.json")


VALUES = st.sampled_from([None, True, -1, 0, 10**400, 1.5, "", "x", [], {}, [[]]]) | st.sampled_from(HOSTILE_NAMES)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_is_in_the_file_reading_ends_in_an_error_or_in_a_sound_curve(text, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "curve.json"
    damage = data.draw(
        st.sampled_from([truncated, with_changed_bytes, lambda t, d: with_changed_values(t, d, VALUES)])
    )
    path.write_bytes(damage(text, data))
    try:
        curve = SizeCurve.load(path)
    except InvalidFileError:
        return
    sizes = [point.parameters for point in curve.points]
    assert sizes == sorted(set(sizes))
    assert 0 < sizes[-1] <= curve.num_parameters
    assert all(list(point.ranks) == curve.layers for point in curve.points)
    assert all(type(rank) is int and rank >= 0 for point in curve.points for rank in point.ranks.values())
