"""`fim-lora report`."""

import json
import shutil

import pytest

from fim_lora import LoraCompression, RankAllocation
from fim_lora_command import main
from helpers.cli_inputs import OUR_FILES, allocate, compress, error_line, files


@pytest.fixture(scope="module")
def compressed(adapter, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compressed") / "out"
    assert compress(adapter, data, folder, "--keep", 0.5, "--eval-data", data) == 0
    return folder


@pytest.fixture
def copied(allocated, tmp_path):
    return shutil.copytree(allocated / "plain", tmp_path / "out")


def report(folder, *options):
    return main(["report", *[str(word) for word in (folder, *options)]])


def test_the_file_of_the_ranks_and_a_home_folder(copied, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert report(copied / "fim_allocation.json") == 0
    assert report(copied, "--output=~/page.html") == 0
    assert (tmp_path / "page.html").read_text() == (copied / "report.html").read_text()


def test_the_report_of_an_allocation_is_written_into_its_folder(copied, llama, capsys):
    assert report(copied) == 0
    assert str(copied / "report.html") in capsys.readouterr().out
    assert files(copied) == sorted([*OUR_FILES, "report.html"])
    page = (copied / "report.html").read_text()
    for name in RankAllocation.load(copied / "fim_allocation.json").ranks:
        assert f'title="{name}"' in page
    provenance = json.loads((copied / "fim_allocation.json").read_text())["provenance"]
    for word in (str(llama), provenance["date"], provenance["data"]["sha256"], f'<p class="model">{llama.name}</p>'):
        assert word in page
    assert "<script" not in page


def test_the_report_of_a_compression_has_all_sizes_of_its_file(compressed, tmp_path):
    file = tmp_path / "new" / "page.html"
    assert report(compressed, "--output", file) == 0
    assert not (compressed / "report.html").exists()
    page = file.read_text()
    script = page.partition('<script type="application/json" id="sizes">')[2].partition("</script>")[0]
    points = json.loads(script)["points"]
    curve = json.loads((compressed / "fim_size_curve.json").read_text())
    assert [point["ranks"] for point in points] == [point["ranks"] for point in curve["points"]]
    result = LoraCompression.load(compressed / "fim_compression.json")
    assert [result.num_parameters, result.loss_increase] in curve["measured"]
    assert list(result.ranks.values()) in [point["ranks"] for point in points]
    assert curve["layers"] == list(result.ranks)


def test_a_report_is_replaced_only_if_that_is_wanted(copied, capsys):
    (copied / "report.html").write_text("mine")
    assert report(copied) == 1
    assert "--overwrite" in error_line(capsys)
    assert (copied / "report.html").read_text() == "mine"
    assert report(copied, "--overwrite") == 0
    assert (copied / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_a_new_allocation_warns_of_the_report_of_an_earlier_one(copied, llama, data, capsys):
    (copied / "report.html").write_text("old")
    assert allocate(llama, data, copied, "--overwrite") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "report.html" in line]
    assert lines == [
        f"fim-lora: warning: {copied / 'report.html'} is the report of an earlier run: run fim-lora report {copied} "
        "--overwrite afterwards."
    ]


def test_without_its_sizes_a_compression_is_reported_and_the_page_says_what_is_missing(compressed, tmp_path):
    folder = shutil.copytree(compressed, tmp_path / "old")
    (folder / "fim_size_curve.json").unlink()
    assert report(folder) == 0
    page = (folder / "report.html").read_text()
    assert "<script" not in page
    assert "fim_size_curve.json" in page


def test_sizes_of_another_compression_or_damaged_ones_are_refused(compressed, adapter, data, tmp_path, capsys):
    folder = shutil.copytree(compressed, tmp_path / "mixed")
    content = json.loads((folder / "fim_size_curve.json").read_text())
    ranks = list(LoraCompression.load(folder / "fim_compression.json").ranks.values())
    content["points"] = [point for point in content["points"] if point["ranks"] != ranks]
    (folder / "fim_size_curve.json").write_text(json.dumps(content))
    assert report(folder) == 1
    assert "is of another compression" in error_line(capsys)
    (folder / "fim_size_curve.json").write_text("{}")
    assert report(folder) == 1
    assert "is not a fim_size_curve file" in error_line(capsys)
    assert not (folder / "report.html").exists()


def test_a_folder_without_a_result_is_refused(tmp_path, capsys):
    assert report(tmp_path) == 1
    assert "fim_allocation.json: no such file" in error_line(capsys)
    assert files(tmp_path) == []
