"""`fim-lora show`."""

import json
import re

import pytest

from fim_lora_command import main
from helpers.cli_inputs import allocate, compress, error_line


def snapshot(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_show_prints_the_ranks_again_and_changes_nothing(llama, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert allocate(llama, data, out) == 0
    printed = capsys.readouterr().out
    (out / "rank_map.png").unlink()
    before, changed = snapshot(out), out.stat().st_mtime_ns
    assert main(["show", str(out)]) == 0
    shown = capsys.readouterr().out
    table, _ = printed.split("Ranks in", 1)[1].rsplit("Next: ", 1)
    assert table == shown.split("Ranks in", 1)[1]
    assert (snapshot(out), out.stat().st_mtime_ns) == (before, changed)


def facts(text):
    """Heading to text of the first block."""
    lines = text.split("\n\n")[0].splitlines()
    return {heading: text.strip() for heading, text in (re.split(" {2,}", line, maxsplit=1) for line in lines)}


def test_show_says_model_data_and_date(llama, data, tmp_path, capsys):
    assert allocate(llama, data, tmp_path / "out") == 0
    path = tmp_path / "out" / "fim_allocation.json"
    content = json.loads(path.read_text())
    content["provenance"]["date"] = "2026-03-04T23:30:00-02:00"
    path.write_text(json.dumps(content))
    capsys.readouterr()
    assert main(["show", str(tmp_path / "out")]) == 0
    shown = facts(capsys.readouterr().out)
    assert shown["Model"] == f"{llama} (LlamaForCausalLM, float32, cpu)"
    assert shown["Data"] == f"{data}, split train: 12 rows"
    assert shown["Date"] == "2026-03-05 01:30 UTC"


def test_show_says_where_a_compression_comes_from(adapter, llama, data, tmp_path, capsys):
    assert compress(adapter, data, tmp_path / "out", "--keep", 0.5, "--eval-data", data) == 0
    capsys.readouterr()
    before = snapshot(tmp_path / "out")
    assert main(["show", str(tmp_path / "out")]) == 0
    shown = facts(capsys.readouterr().out)
    assert shown["Adapter"] == str(adapter)
    assert shown["Model"] == f"{llama} (LlamaForCausalLM, float32, cpu)"
    assert shown["Data"] == shown["Evaluation"] == f"{data}, split train: 12 rows"
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize(
    "provenance",
    [
        {},
        None,
        ["model"],
        {"model": 3, "data": [], "date": {}, "dtype": None},
        {"model": {"name": None, "class": 1}, "data": {"name": 2, "rows": True}, "date": "yesterday"},
        {"date": "0001-01-01T00:00:00+14:00", "reallocated": {"date": 1}},
    ],
)
def test_what_is_not_recorded_is_left_out(llama, data, tmp_path, capsys, provenance):
    assert allocate(llama, data, tmp_path / "out") == 0
    path = tmp_path / "out" / "fim_allocation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"provenance": provenance}))
    capsys.readouterr()
    assert main(["show", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert facts(captured.out).keys() == {"Budget", "Ranks", "Adapter", "eFIM"}


def test_texts_of_the_file_cannot_control_the_terminal(llama, data, tmp_path, capsys):
    assert allocate(llama, data, tmp_path / "out") == 0
    path = tmp_path / "out" / "fim_allocation.json"
    hostile = {"model": {"name": "\x1b[2J\n[red]x" + "y" * 10_000}, "data": {"name": "\r\x07[/]", "split": "\x9b"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"provenance": hostile}))
    capsys.readouterr()
    assert main(["show", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.splitlines())
    assert r"\x1b[2J\n[red]x" in out
    assert r"\r\x07[/]" in out
    assert len(out) < 5000
    assert main(["show", str(tmp_path / "out"), "--json"]) == 0
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.splitlines())
    assert json.loads(out)["provenance"] == hostile


def test_show_refuses_what_is_no_allocation(tmp_path, capsys):
    assert main(["show", str(tmp_path / "nope")]) == 1
    assert "fim_allocation.json: no such file. Give the folder that" in error_line(capsys)
    (tmp_path / "fim_allocation.json").write_text("{}")
    assert main(["show", str(tmp_path)]) == 1
    assert "is not a fim_allocation file" in error_line(capsys)


def test_show_reads_a_folder_for_servers(llama, data, tmp_path, capsys):
    assert allocate(llama, data, tmp_path / "plain") == 0
    assert allocate(llama, data, tmp_path / "serving", "--serving") == 0
    capsys.readouterr()
    shown = []
    for name in ("plain", "serving"):
        assert main(["show", str(tmp_path / name)]) == 0
        shown.append(capsys.readouterr().out.split("Ranks in", 1)[1])
    assert shown[0] == shown[1]
