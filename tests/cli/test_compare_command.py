"""`fim-lora compare`."""

import json
import re

import pytest
from matplotlib.image import imread
from scipy.stats import spearmanr

from fim_lora_command import main
from helpers.cli_inputs import allocate, compress, error_line, files


@pytest.fixture(scope="module")
def results(llama, adapter, data, tmp_path_factory):
    """Two allocations of different targets, and the compression of an adapter, which loses layers."""
    folder = tmp_path_factory.mktemp("results")
    assert allocate(llama, data, folder / "first", "--target-modules", "q_proj,v_proj,up_proj") == 0
    assert allocate(llama, data, folder / "second", "--target-modules", "q_proj,v_proj,down_proj", "--seed", 1) == 0
    assert compress(adapter, data, folder / "small", "--keep", 0.2) == 0
    return folder


def content(folder):
    [path] = [file for file in folder.glob("fim_*.json") if file.name != "fim_size_curve.json"]
    return json.loads(path.read_text())


def compare(capsys, first, second, *options):
    capsys.readouterr()
    assert main(["compare", *map(str, (first, second, *options))]) == 0
    return capsys.readouterr()


@pytest.mark.parametrize(("first", "second"), [("first", "second"), ("second", "small"), ("small", "small")])
def test_json_says_what_the_two_files_say(results, capsys, first, second):
    captured = compare(capsys, results / first, results / second, "--json")
    found = json.loads(captured.out)
    assert captured.err == ""
    a, b = (content(results / name)["ranks"] for name in (first, second))
    assert (found["first"]["ranks"], found["second"]["ranks"]) == (a, b)
    common = sorted(a.keys() & b.keys())
    assert found["num_common_layers"] == len(common) > 0
    expected = spearmanr([a[name] for name in common], [b[name] for name in common]).statistic
    assert found["rank_correlation"] == pytest.approx(expected, abs=1e-12)
    assert sorted(found["different_layers"]) == [name for name in common if a[name] != b[name]]
    assert set(found["only_first"]) == a.keys() - b.keys()
    assert set(found["only_second"]) == b.keys() - a.keys()


def test_the_tables_have_every_layer_of_both(results, llama, data, capsys):
    out = compare(capsys, results / "first", results / "second").out
    a, b = (content(results / name)["ranks"] for name in ("first", "second"))
    for name in a.keys() | b.keys():
        depth, kind = int(name.split(".")[2]), name.split(".")[-1]
        columns, _, *rows = out.split("depth ")[1].splitlines()
        cells = dict(zip(columns.split(), re.findall(r"(?:\d+|–) \| (?:\d+|–)", rows[depth]), strict=True))
        assert cells[kind] == f"{a.get(name, '–')} | {b.get(name, '–')}", out
    text = " ".join(out.split())
    assert "over 4 layers of both" in text
    assert f"Only in {results / 'first'}: 2 layers, model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj" in text
    assert f"Only in {results / 'second'}: 2 layers, model.layers.0.mlp.down_proj" in text
    for fact in (str(llama), str(data), "first", "second", "1,"):
        assert fact in text


def test_what_is_undefined_is_said(results, llama, data, tmp_path, capsys):
    assert allocate(llama, data, tmp_path / "other", "--target-modules", "k_proj") == 0
    assert allocate(llama, data, tmp_path / "equal", "-r", 4, "--r-max", 4, "--target-modules", "q_proj") == 0
    assert "undefined, because no layer is in both" in compare(capsys, results / "first", tmp_path / "other").out
    out = compare(capsys, results / "first", tmp_path / "equal").out
    assert "undefined, because all ranks of one of them are equal, over 2 layers" in out
    assert json.loads(compare(capsys, results / "first", tmp_path / "equal", "--json").out)["rank_correlation"] is None


def test_the_picture_is_written_only_if_asked_for(results, tmp_path, capsys):
    before = [files(results / name) for name in ("first", "small")]
    compare(capsys, results / "first", results / "small")
    compare(capsys, results / "first", results / "small", "--output", tmp_path / "new" / "ranks.png")
    assert [files(results / name) for name in ("first", "small")] == before
    assert files(tmp_path) == ["new"]
    assert imread(tmp_path / "new" / "ranks.png").size > 0
    arguments = ["compare", results / "first", results / "small", "--output", tmp_path / "new" / "ranks.png"]
    assert main(list(map(str, arguments))) == 1
    assert "exists: give another --output, or --overwrite" in error_line(capsys)
    assert main(list(map(str, [*arguments, "--overwrite"]))) == 0
    assert main(list(map(str, [*arguments[:3], "--overwrite"]))) == 2
    assert "no effect without --output" in error_line(capsys)


@pytest.mark.parametrize(
    ("second", "options", "message"),
    [
        ("nothing", [], "fim_allocation.json: no such file"),
        ("second", ["--output", "ranks.doc"], "Format 'doc' is not supported"),
    ],
)
def test_wrong_uses_end_in_one_line_and_write_nothing(
    results, tmp_path, capsys, monkeypatch, second, options, message
):
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["compare", *map(str, (results / "first", results / second, *options))]) == 1
    assert message in error_line(capsys)
    assert files(tmp_path) == []
