"""`FimScores` and `LayerScore`, and the files that hold them."""

import json
import math

import pytest

from fim_lora import FimScores, InvalidFileError, LayerScore

SCORES = FimScores(
    {"a.b": LayerScore(0.25, 0.01, 8, (3, 5)), "c": LayerScore(1e-12, None, 1, (2, 2), 36, rank_step=2)}, 2, 1
)


def test_it_is_a_mapping():
    assert list(SCORES) == ["a.b", "c"]
    assert len(SCORES) == 2
    assert SCORES["a.b"].shape == (3, 5)
    assert SCORES.means == {"a.b": 0.25, "c": 1e-12}
    assert SCORES.shapes == {"a.b": (3, 5), "c": (2, 2)}
    assert SCORES.parameters_per_rank == {"a.b": 8, "c": 36}
    assert SCORES.rank_steps == {"a.b": 1, "c": 2}
    assert SCORES.num_examples == 8
    assert repr(SCORES) == "FimScores(2 layers, 2 batches, 8 examples)"
    assert FimScores({}) != SCORES


def test_save_and_load(tmp_path):
    path = tmp_path / "scores.json"
    SCORES.save(path)
    assert FimScores.load(path) == SCORES
    assert FimScores.load(path)["c"].standard_error is None


def test_files_without_costs_and_steps_are_of_plain_matrices(tmp_path):
    path = tmp_path / "scores.json"
    SCORES.save(path)
    content = json.loads(path.read_text())
    for layer in content["layers"].values():
        del layer["parameters_per_rank"], layer["rank_step"]
    path.write_text(json.dumps(content))
    scores = FimScores.load(path)
    assert scores.parameters_per_rank == {"a.b": 8, "c": 4}
    assert scores.rank_steps == {"a.b": 1, "c": 1}
    assert scores["a.b"] == SCORES["a.b"]


@pytest.mark.parametrize("change", [{"layers": {"a": {}}}, {"layers": [1]}, {"num_batches": "x"}, {"layers": None}])
def test_damaged_files(tmp_path, change):
    path = tmp_path / "scores.json"
    SCORES.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InvalidFileError, match=r"scores\.json is damaged"):
        FimScores.load(path)


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "scores.json"
    SCORES.save(path)

    def no_space(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr("pathlib.Path.replace", no_space)
    with pytest.raises(OSError, match="no space left"):
        FimScores({}).save(path)
    monkeypatch.undo()
    assert FimScores.load(path) == SCORES
    assert [entry.name for entry in tmp_path.iterdir()] == ["scores.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((math.nan, 0.1, 1, (1, 1)), "mean must be finite and not negative, got nan"),
        ((-1.0, 0.1, 1, (1, 1)), "got -1.0"),
        ((1.0, math.inf, 1, (1, 1)), "standard_error .* got inf"),
        ((1.0, 0.1, -1, (1, 1)), "num_examples .* got -1"),
        ((1.0, 0.1, 1, (0, 1)), r"shape .* got \(0, 1\)"),
        ((1.0, 0.1, 1, (1, 1), 0), "parameters_per_rank must be a positive integer, got 0"),
        ((1.0, 0.1, 1, (1, 1), None, 0), "rank_step must be a positive integer, got 0"),
    ],
)
def test_invalid_layer_scores(arguments, message):
    with pytest.raises(ValueError, match=message):
        LayerScore(*arguments)
