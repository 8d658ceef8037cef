"""`--json`: one document on standard output."""

import json
from datetime import datetime, timedelta, timezone

import pytest

from fim_lora import LoraCompression, RankAllocation
from fim_lora.runtime import progress
from fim_lora_command import main
from helpers.cli_inputs import allocate, compress


def document(capsys):
    """The one document; whatever is not part of it is an error of the parser."""
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def chatty(monkeypatch):
    """Progress as often as possible."""
    monkeypatch.setattr(progress, "_SECONDS_PER_LINE", 0.001)


@pytest.mark.usefixtures("chatty")
def test_allocate_prints_what_it_writes(llama, data, tmp_path, capsys):
    assert allocate(llama, data, tmp_path / "out", "--json") == 0
    found = document(capsys)
    written = RankAllocation.load(tmp_path / "out" / "fim_allocation.json")
    assert RankAllocation.from_dict(found) == written
    assert (found["kind"], found["folder"]) == ("allocation", str(tmp_path / "out"))
    assert found["num_parameters"] == written.num_parameters
    assert found["seconds"].keys() == {"loading", "tokenizing", "calibrating"}
    for arguments in (
        ["show", tmp_path / "out"],
        ["allocate", "--scores", tmp_path / "out", "--output", tmp_path / "b"],
    ):
        assert main([*map(str, arguments), "--json"]) == 0
        again = document(capsys)
        assert RankAllocation.from_dict(again) == written
        assert again["provenance"].items() >= found["provenance"].items()


@pytest.mark.usefixtures("chatty")
def test_compress_prints_what_it_writes(adapter, data, tmp_path, capsys):
    assert compress(adapter, data, tmp_path / "out", "--keep", 0.5, "--eval-data", data, "--json") == 0
    found = document(capsys)
    written = LoraCompression.load(tmp_path / "out" / "fim_compression.json")
    assert LoraCompression.from_dict(found) == written
    assert found["kind"] == "compression"
    assert found["num_parameters"] == written.num_parameters < found["num_parameters_before"]
    assert main(["show", str(tmp_path / "out"), "--json"]) == 0
    shown = document(capsys)
    assert shown == {key: value for key, value in found.items() if key != "seconds"}


def test_warnings_are_not_in_the_document(llama, data, tmp_path, capsys):
    assert allocate(llama, data, tmp_path / "out", "--batches", 9, "--batch-size", 4, "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["kind"] == "allocation"
    assert "fim-lora: warning: The dataloader yielded 3 batches" in captured.err


def test_an_error_leaves_standard_output_empty(tmp_path, capsys):
    assert main(["show", str(tmp_path), "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fim-lora: error: ")


def test_the_date_is_that_of_the_run(llama, data, tmp_path, capsys):
    before = datetime.now(timezone.utc) - timedelta(seconds=1)
    assert allocate(llama, data, tmp_path / "out", "--json") == 0
    date = datetime.fromisoformat(document(capsys)["provenance"]["date"])
    assert before <= date <= datetime.now(timezone.utc)
