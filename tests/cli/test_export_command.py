"""`fim-lora export`."""

import csv
import io
import json
import os
from dataclasses import replace

import pytest
import yaml
from peft import LoraConfig

from fim_lora import RankAllocation
from fim_lora_command import main
from helpers.cli_inputs import allocate, error_line, files


def copied(folder, target):
    """A folder of the same allocation that a test may damage."""
    target.mkdir()
    for name in ("adapter_config.json", "fim_allocation.json"):
        (target / name).write_bytes((folder / "plain" / name).read_bytes())
    return target


def export(folder, *options):
    return main(["export", *[str(word) for word in (folder, *options)]])


def test_serving_puts_the_largest_rank_and_its_alpha_into_the_config(allocated):
    plain, serving = (LoraConfig.from_pretrained(str(allocated / name)) for name in ("plain", "serving"))
    allocation = RankAllocation.load(allocated / "serving" / "fim_allocation.json")
    assert allocation == RankAllocation.load(allocated / "plain" / "fim_allocation.json")
    assert (plain.r, plain.lora_alpha) == (8, 8)
    assert serving.r == serving.lora_alpha == max(allocation.ranks.values()) > 8


@pytest.mark.parametrize("name", ["plain", "serving"])
def test_export_prints_nothing_but_the_text(allocated, name, capsys):
    allocation = RankAllocation.load(allocated / name / "fim_allocation.json")
    assert export(allocated / name, "--format", "csv") == 0
    rows = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert {row["layer"]: int(row["rank"]) for row in rows} == allocation.ranks
    assert export(allocated / name, "--format", "axolotl") == 0
    content = yaml.safe_load(capsys.readouterr().out)
    assert content["lora_rank_pattern"] == content["lora_alpha_pattern"] == allocation.rank_pattern
    assert (content["lora_r"], content["lora_alpha"], content["lora_target_modules"]) == (8, 8, "all-linear")


@pytest.mark.parametrize("source", ["plain", "serving"])
@pytest.mark.parametrize("options", [[], ["--serving"]])
def test_export_writes_the_config_of_either_kind_from_either_kind(allocated, source, options, tmp_path, capsys):
    target = tmp_path / "new" / "adapter_config.json"
    assert export(allocated / source, "--format", "peft", "--output", target, *options) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert files(tmp_path / "new") == ["adapter_config.json"]
    expected = allocated / ("serving" if options else "plain")
    assert LoraConfig.from_pretrained(str(tmp_path / "new")) == LoraConfig.from_pretrained(str(expected))


@pytest.mark.parametrize("serving", [False, True])
def test_export_keeps_layers_without_adapter_out(allocated, tmp_path, capsys, serving):
    allocation = RankAllocation.load(allocated / "plain" / "fim_allocation.json")
    first, *others = allocation.ranks
    allocation = replace(allocation, ranks=allocation.ranks | {first: 0})
    base = LoraConfig.from_pretrained(str(allocated / "plain"))
    allocation.to_lora_config(base, serving=serving).save_pretrained(tmp_path)
    allocation.save(tmp_path / "fim_allocation.json")
    assert export(tmp_path, "--format", "axolotl") == 0
    content = yaml.safe_load(capsys.readouterr().out)
    assert content["lora_target_modules"] == sorted(others)
    assert first not in content["lora_rank_pattern"]


def test_export_replaces_a_file_only_when_told(allocated, tmp_path, capsys):
    target = tmp_path / "ranks.csv"
    target.write_text("mine")
    # The error is raised before the folder is read.
    assert export(tmp_path / "nope", "--format", "csv", "--output", target) == 1
    assert f"{target} exists: give another --output, or --overwrite" in error_line(capsys)
    assert target.read_text() == "mine"
    assert export(allocated / "plain", "--format", "csv", "--output", target, "--overwrite") == 0
    assert target.read_text().startswith("layer,norm,")
    assert export(allocated / "plain", "--format", "csv") == 0
    assert capsys.readouterr().out == target.read_text()
    assert files(tmp_path) == ["ranks.csv"]


def test_export_refuses_a_place_where_no_file_can_be(allocated, tmp_path, capsys, monkeypatch):
    assert export(allocated / "plain", "--format", "csv", "--output", tmp_path) == 1
    assert "is a folder" in error_line(capsys)
    (tmp_path / "file").write_text("")
    assert export(allocated / "plain", "--format", "csv", "--output", tmp_path / "file" / "ranks.csv") == 1
    assert "is not a folder" in error_line(capsys)
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    assert export(allocated / "plain", "--format", "csv", "--output", tmp_path / "ranks.csv") == 1
    assert "Permission denied" in error_line(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "toml"], "'--format': 'toml' is not one of csv, axolotl, peft"),
        ([], "Missing option '--format'"),
    ],
)
def test_wrong_usage_of_export(allocated, capsys, options, message):
    assert export(allocated / "plain", *options) == 2
    line = error_line(capsys)
    assert message in line
    assert line.endswith("(see fim-lora export --help)")


def test_export_needs_both_files(allocated, tmp_path, capsys):
    folder = copied(allocated, tmp_path / "copy")
    (folder / "adapter_config.json").unlink()
    assert export(folder, "--format", "csv") == 1
    assert "adapter_config.json: no such file. Run fim-lora allocate again" in error_line(capsys)
    (folder / "fim_allocation.json").unlink()
    assert export(folder, "--format", "csv") == 1
    assert "fim_allocation.json: no such file. Give the folder that" in error_line(capsys)


@pytest.mark.parametrize("content", ["{", "[]", '{"peft_type": "CHESS"}', '{"peft_type": "LORA", "r": "many"}'])
def test_export_refuses_a_damaged_adapter_config(allocated, tmp_path, capsys, content):
    folder = copied(allocated, tmp_path / "copy")
    (folder / "adapter_config.json").write_text(content)
    assert export(folder, "--format", "csv", "--output", tmp_path / "ranks.csv") == 1
    line = error_line(capsys)
    assert "adapter_config.json" in line
    assert line.endswith("llocate again.") or line.endswith("allocate again.")
    assert files(tmp_path) == ["copy"]


@pytest.mark.parametrize("change", [{"rank_pattern": {}}, {"alpha_pattern": {}}, {"use_rslora": True}])
def test_export_refuses_an_adapter_config_of_another_allocation(allocated, tmp_path, capsys, change):
    folder = copied(allocated, tmp_path / "copy")
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(content | change))
    assert export(folder, "--format", "peft") == 1
    assert "has other ranks or scalings than" in error_line(capsys)


def test_export_refuses_another_kind_of_adapter(allocated, tmp_path, capsys):
    folder = copied(allocated, tmp_path / "copy")
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3", "target_modules": ["q_proj"]}')
    assert export(folder, "--format", "peft") == 1
    assert "is not a LoRA config" in error_line(capsys)


def test_export_says_what_a_format_cannot(llama, data, tmp_path, capsys):
    assert allocate(llama, data, tmp_path / "out", "--lora-alpha", 5) == 0
    capsys.readouterr()
    assert export(tmp_path / "out", "--format", "axolotl", "--output", tmp_path / "lora.yaml") == 1
    assert "axolotl takes only integers as alphas" in error_line(capsys)
    assert files(tmp_path) == ["out"]
