"""The files of `LoraSpectrum` and `LoraCompression`: what is written is read, and nothing else is."""

import base64
import json
import math
import string
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fim_lora import InvalidFileError, LoraCompression, LoraSpectrum
from fim_lora.ranks.sizes import Prediction
from helpers.damaged_json import HOSTILE_NAMES, truncated, with_changed_bytes, with_changed_values
from helpers.known_spectra import EXAMPLES, LAYERS
from helpers.known_spectra import known_compression as compression
from helpers.known_spectra import known_spectrum as spectrum

MAKE = {LoraSpectrum: lambda: spectrum(EXAMPLES, 3), LoraCompression: compression}
KINDS = pytest.mark.parametrize("kind", MAKE, ids=lambda kind: kind.__name__)


def written(directory, value):
    path = directory / "file.json"
    value.save(path)
    return path.read_text()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    directory = tmp_path_factory.mktemp("good")
    return {kind: written(directory, make()) for kind, make in MAKE.items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


# --- What is written is read ---


@pytest.mark.parametrize(("examples", "scaled"), [(EXAMPLES, 0), (EXAMPLES, 3), (1, 1), (0, 0)])
def test_save_and_load_a_spectrum(tmp_path, examples, scaled):
    value, path = spectrum(examples, scaled), tmp_path / "fim_spectrum.json"
    value.save(path, seed=3)
    again = LoraSpectrum.load(path)
    assert again == value
    assert type(again) is LoraSpectrum
    for name, layer in value.items():
        for field in ("left", "right", "gates", "squared_norms", "gains"):
            np.testing.assert_array_equal(getattr(again[name], field), getattr(layer, field))
        assert again[name].saliencies == layer.saliencies
        assert again[name].priorities == layer.priorities
        assert again[name].standard_errors == layer.standard_errors
    assert str(again) == str(value) == repr(again)
    content = json.loads(path.read_text())
    assert (content["format"], content["schema_version"]) == ("fim_spectrum", 1)
    assert content["provenance"] == {"seed": 3}
    assert again != spectrum(2)
    assert again != "a spectrum"


COMPRESSIONS = [
    {},
    {"size": ("r", 4)},
    {"size": ("max_loss_increase", 0.01), "r_max": 16},
    {"predicted": None, "loss_before": None, "loss_after": None, "use_rslora": True},
    {"predicted": Prediction(0.5, None)},
    {"lora_alpha": 2.5},
]


@pytest.mark.parametrize("changes", COMPRESSIONS)
def test_save_and_load_a_compression(tmp_path, changes):
    value, path = compression(**changes), tmp_path / "fim_compression.json"
    value.save(path, seed=3)
    again = LoraCompression.load(path)
    assert again == value
    assert type(again) is LoraCompression
    assert (again.rank_pattern, again.alpha_pattern) == (value.rank_pattern, value.alpha_pattern)
    assert str(again) == str(value) == repr(again)
    content = json.loads(path.read_text())
    assert (content["format"], content["schema_version"]) == ("fim_compression", 1)


def test_the_numbers_of_a_compression():
    value = compression()
    assert value.dropped_layers == ["layers.1.q_proj"]
    assert value.num_parameters == 2 * 4 + 2 * 6 + 10
    assert value.num_parameters_before == 3 * 4 + 4 * 6 + 2 * 4 + 2 * 10
    assert value.share == 30 / 64
    assert value.loss_increase == 0.25
    assert compression(loss_before=None, loss_after=None).loss_increase is None
    assert value.rank_pattern == {"head": 1}
    assert value.alpha_pattern == {"head": 1.5}


def test_the_numbers_of_a_spectrum():
    value = spectrum()
    assert value.ranks == {"layers.0.q_proj": 3, "layers.0.conv": 4, "layers.1.q_proj": 2, "head": 2}
    assert value.costs == {"layers.0.q_proj": 4, "layers.0.conv": 12, "layers.1.q_proj": 4, "head": 10}
    assert value.num_parameters == 64
    for name, layer in value.items():
        squares = layer.gates.astype(np.float64) ** 2 / 2
        assert layer.saliencies == pytest.approx(squares.mean(0).tolist())
        assert layer.standard_errors == pytest.approx((squares.std(0, ddof=1) / math.sqrt(EXAMPLES)).tolist())
        assert value.max_components(3)[name] == (1 if name == "layers.0.conv" else 3)
    kept = value.keep(30)
    dropped = {name: [j for j in range(layer.num_components) if j not in kept[name]] for name, layer in value.items()}
    total = sum(layer.gates[:, dropped[name]].sum(1, dtype=np.float64) for name, layer in value.items())
    by_example = total**2 / 2 - total / math.sqrt(5.5)
    assert value.predict(kept).increase == pytest.approx(by_example.mean())
    assert value.predict(kept).standard_error == pytest.approx(by_example.std(ddof=1) / math.sqrt(EXAMPLES))
    everything = value.keep(value.num_parameters)
    assert value.predict(everything) == (0.0, 0.0)
    assert spectrum(1)["head"].standard_errors is None
    assert spectrum(1).predict(kept).standard_error is None


@pytest.mark.parametrize("r_max", [None, 1, 2])
def test_sizes_are_never_above_the_share_or_the_cap(r_max):
    value = spectrum()
    for parameters in range(value.num_parameters + 1):
        point = value.size_point(parameters, r_max=r_max)
        assert point.parameters <= parameters
        assert point.parameters == sum(rank * LAYERS[name][0] for name, rank in point.ranks.items())
        assert point.share == point.parameters / 64
        assert r_max is None or max(point.ranks.values()) <= r_max


def test_the_share_of_a_size_leads_back_to_it():
    """`29 / 100 * 100` is less than 29 in floating point."""
    layers = dict(spectrum())
    for cost in range(1, 100):
        layers["head"] = replace(layers["head"], parameters_per_rank=cost)
        value = LoraSpectrum(layers)
        for parameters in range(value.num_parameters + 1):
            assert value.parameters_of_share(parameters / value.num_parameters) == parameters
    assert spectrum().parameters_of_share(0.5) == 32
    assert spectrum().parameters_of_share(0.4999) == 31


# --- What is not written is not read ---


def change(path, *keys, to):
    content = json.loads(path.read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to(inner[keys[-1]]) if callable(to) else to
    path.write_text(json.dumps(content))


def numbers(*values):
    return base64.b64encode(np.array(values, "<f4").tobytes()).decode()


SPECTRUM_DAMAGE = [
    (("num_batches",), 0, "num_batches, num_examples and num_scaled_examples do not fit"),
    (("num_examples",), 7, "an array has"),
    (("num_examples",), 2**53, "an array has"),
    (("terms_per_example",), 0.0, "terms_per_example is 0.0, not positive"),
    (("terms_per_example",), -1, "not positive"),
    (("terms_per_example",), "1", "is not a number"),
    (("adapter_name",), "\x1b[2J", "is not the name of a layer"),
    (("adapter_name",), 3, "TypeError"),
    (("layers",), {}, "there are no layers"),
    (("layers",), ["head"], "AttributeError"),
    (("layers", "head", "shape"), [12], "ValueError"),
    (("layers", "head", "shape"), [12, 0], "0 is not between 1 and"),
    (("layers", "head", "num_components"), 3, "an array has"),
    (("layers", "head", "num_components"), 2**53, "an array has"),
    (("layers", "head", "num_parts"), True, "True is not an integer"),
    (("layers", "head", "fingerprint"), "0", "is not a fingerprint"),
    (("layers", "head", "fingerprint"), "-" * 32, "is not a fingerprint"),
    (("layers", "head", "scaling"), "1", "is not a number"),
    (("layers", "head", "left"), 3, "an array is not text"),
    (("layers", "head", "left"), "%%%%", "damaged"),
    (("layers", "head", "left"), lambda text: text[:-4], "damaged"),
    (("layers", "head", "left"), numbers(1, 2, float("nan"), 4), "not finite"),
    (("layers", "head", "gates"), None, "gates and num_examples do not fit"),
    (("num_scaled_examples",), 11, "num_batches, num_examples and num_scaled_examples do not fit"),
    (("num_scaled_examples",), -1, "damaged"),
    (("num_scaled_examples",), 0, "gains and num_scaled_examples do not fit"),
    (("layers", "head", "gains"), None, "gains and num_scaled_examples do not fit"),
    (("layers", "head", "gains"), numbers(1), "an array has 4 bytes, not 8"),
    (("layers", "head", "gains"), numbers(1, float("nan")), "not finite"),
    (("layers", "head", "squared_norms"), numbers(1, -1), "a squared norm is negative"),
    (("layers", "head", "squared_norms"), numbers(1, float("inf")), "not finite"),
]


@pytest.mark.parametrize(("keys", "to", "message"), SPECTRUM_DAMAGE)
def test_damaged_spectra(tmp_path, keys, to, message):
    path = tmp_path / "fim_spectrum.json"
    spectrum(EXAMPLES, 3).save(path)
    change(path, *keys, to=to)
    with pytest.raises(InvalidFileError, match=message) as raised:
        LoraSpectrum.load(path)
    assert "Measure the spectrum again." in str(raised.value)


COMPRESSION_DAMAGE = [
    (("ranks", "head"), 3, "a rank is larger than before"),
    (("ranks",), dict.fromkeys(LAYERS, 0), "all are 0"),
    (("ranks",), {}, "different layers or none"),
    (("ranks", "head"), 1.0, "1.0 is not an integer"),
    (("alphas",), {"head": 3}, "different layers or none"),
    (("alphas", "head"), True, "True is not a number"),
    (("parameters_per_rank", "head"), 0, "0 is not between 1 and"),
    (("size",), ["half", 0.5], "'half' is not a kind of size"),
    (("size",), ["keep"], "ValueError"),
    (("size",), ["keep", None], "is not a number"),
    (("r",), 0, "0 is not between 1 and"),
    (("r_max",), 0, "0 is not between 1 and"),
    (("use_rslora",), 1, "neither true nor false"),
    (("criterion",), "\x1b[2J", "criterion is not printable text"),
    (("criterion",), None, "criterion is not printable text"),
    (("predicted",), [1.0], "ValueError"),
    (("predicted",), 1.0, "TypeError"),
    (("loss_after",), "1", "is not a number"),
]


@pytest.mark.parametrize(("keys", "to", "message"), COMPRESSION_DAMAGE)
def test_damaged_compressions(tmp_path, keys, to, message):
    path = tmp_path / "fim_compression.json"
    compression().save(path)
    change(path, *keys, to=to)
    with pytest.raises(InvalidFileError, match=message) as raised:
        LoraCompression.load(path)
    assert "Compress again." in str(raised.value)


@KINDS
def test_the_file_of_another_kind(kind, texts, tmp_path):
    for other, text in texts.items():
        path = tmp_path / "file.json"
        path.write_text(text)
        if other is not kind:
            with pytest.raises(InvalidFileError, match="is not a fim_"):
                kind.load(path)


# --- Untrusted files: an error, or an object that can be used ---


def is_integer(value, at_least):
    return type(value) is int and at_least <= value <= 2**53


def require_sound(value):
    """Checks the properties that any reader of the object may rely on."""
    assert str(value)
    assert str(value).isascii() or all(line.isprintable() for line in str(value).splitlines())
    for name in value.ranks:
        assert 0 < len(name) <= 1000
        assert name.isprintable()
    if isinstance(value, LoraCompression):
        assert set(value.ranks) == set(value.ranks_before) == set(value.alphas) == set(value.parameters_per_rank)
        assert all(is_integer(rank, 0) and rank <= value.ranks_before[name] for name, rank in value.ranks.items())
        assert 0 < value.share <= 1
        assert value.rows()
        return
    assert is_integer(value.num_examples, 0)
    for layer in value.values():
        size = layer.num_components
        assert layer.left.shape == layer.right.shape == (len(layer.left), size, size)
        assert layer.squared_norms.shape == (size,)
        assert (layer.gates is None) == (not value.with_data)
        assert all(0 <= saliency < math.inf for saliency in layer.saliencies)
        assert (layer.gains is None) == (value.num_scaled_examples == 0)
        assert all(map(math.isfinite, layer.priorities))
    for share in (0.0, 0.5, 1.0):
        point = value.size_point(int(share * value.num_parameters), r_max=8)
        assert point.parameters <= value.num_parameters


def require_error_or_sound_object(kind, data, place):
    path = place / "file.json"
    path.write_bytes(data)
    try:
        value = kind.load(path)
    except InvalidFileError:
        return
    require_sound(value)
    value.save(path)
    assert kind.load(path) == value


THOROUGH = settings(max_examples=60, deadline=None)


@KINDS
@THOROUGH
@given(st.data())
def test_truncated_files(kind, texts, place, data):
    (place / "file.json").write_bytes(truncated(texts[kind], data))
    with pytest.raises(InvalidFileError):
        kind.load(place / "file.json")


@KINDS
@THOROUGH
@given(st.data())
def test_changed_bytes(kind, texts, place, data):
    require_error_or_sound_object(kind, with_changed_bytes(texts[kind], data), place)


HOSTILE_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.sampled_from([10**400, 1e308, -1.5, 5e-324, 0, "1", "NaN", [], {}, [[]], {"": 0}, "AAAA", "////f38="]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(string.printable, max_size=20),
    st.lists(st.floats(width=32, allow_nan=True), max_size=9).map(lambda values: numbers(*values)),
    st.sampled_from(HOSTILE_NAMES),
)


@KINDS
@settings(max_examples=250, deadline=None)
@given(st.data())
def test_changed_values_and_names(kind, texts, place, data):
    damaged = with_changed_values(texts[kind], data, HOSTILE_VALUES)
    require_error_or_sound_object(kind, damaged, place)


@pytest.mark.parametrize("extreme", [3e38, 1e-45, 0.0])
def test_extreme_gates_give_finite_predictions(tmp_path, extreme):
    path = tmp_path / "fim_spectrum.json"
    spectrum().save(path)
    for name, (_, _, size) in LAYERS.items():
        change(path, "layers", name, "gates", to=numbers(*[extreme] * EXAMPLES * size))
    value = LoraSpectrum.load(path)
    require_sound(value)
    prediction = value.predict(value.keep(30))
    assert math.isfinite(prediction.increase)
    assert math.isfinite(prediction.standard_error)
