"""`fim-lora show` and `fim-lora export` on the folder of `fim-lora compress`."""

import csv
import io
import json
import shutil
from dataclasses import replace

import pytest
import yaml
from peft import LoraConfig

from fim_lora import LoraCompression
from fim_lora_command import main
from helpers.cli_inputs import COMPRESSED_FILES, allocate, compress, error_line, files, save_adapter


@pytest.fixture(scope="module")
def compressed(llama, data, tmp_path_factory):
    """Folders of one compression: one in which each layer keeps its scaling, and one for servers."""
    folder = tmp_path_factory.mktemp("compressed")
    adapter = save_adapter(llama, folder / "trained", alpha_pattern={"q_proj": 12})
    assert compress(adapter, data, folder / "plain", "--keep", 0.4) == 0
    assert compress(adapter, data, folder / "serving", "--keep", 0.4, "--serving") == 0
    return folder


def result_of(folder):
    return LoraCompression.load(folder / "fim_compression.json")


def export(folder, *options):
    return main(["export", *[str(word) for word in (folder, *options)]])


def test_show_prints_the_ranks_again_and_changes_nothing(adapter, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert compress(adapter, data, out, "--keep", 0.5) == 0
    printed = capsys.readouterr().out
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert main(["show", str(out)]) == 0
    shown = capsys.readouterr().out
    table, _ = printed.split("Ranks in", 1)[1].rsplit("Next: ", 1)
    assert table == shown.split("Ranks in", 1)[1]
    for word in ("keep = 0.5", "gains of 2 examples in 2 batches", "largest rank", "predicted loss"):
        assert word in shown
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert files(out) == COMPRESSED_FILES


def test_the_compression_is_shown_if_the_folder_has_both(llama, data, compressed, tmp_path, capsys):
    assert allocate(llama, data, tmp_path / "out") == 0
    for path in (compressed / "plain").iterdir():
        shutil.copy(path, tmp_path / "out")
    capsys.readouterr()
    assert main(["show", str(tmp_path / "out")]) == 0
    assert "keep = 0.4" in capsys.readouterr().out


def test_export_as_a_table(compressed, capsys):
    result = result_of(compressed / "plain")
    assert export(compressed / "plain", "--format", "csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {row["layer"]: int(row["rank"]) for row in rows} == result.ranks
    assert {row["layer"]: int(row["rank_before"]) for row in rows} == result.ranks_before
    assert sum(int(row["parameters"]) for row in rows) == result.num_parameters


def test_export_for_axolotl(compressed, tmp_path, capsys):
    result = result_of(compressed / "serving")
    assert export(compressed / "serving", "--format", "axolotl") == 1  # alphas of 1.5 times a rank
    assert "axolotl takes only integers as alphas" in error_line(capsys)
    folder = shutil.copytree(compressed / "serving", tmp_path / "whole")
    alphas = {name: rank * 2 for name, rank in result.ranks.items()}
    whole = replace(result, alphas=alphas, lora_alpha=2 * result.r)
    whole.save(folder / "fim_compression.json")
    content = json.loads((folder / "adapter_config.json").read_text())
    content |= {"lora_alpha": whole.lora_alpha, "alpha_pattern": whole.alpha_pattern}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    assert export(folder, "--format", "axolotl") == 0
    content = yaml.safe_load(capsys.readouterr().out)
    assert (content["lora_r"], content["lora_alpha"]) == (result.r, 2 * result.r)
    assert content["lora_rank_pattern"] == result.rank_pattern
    assert set(content["lora_target_modules"]) == {name for name, rank in result.ranks.items() if rank > 0}


@pytest.mark.parametrize("name", ["plain", "serving"])
def test_export_of_the_config(compressed, tmp_path, capsys, name):
    target = tmp_path / "adapter_config.json"
    assert export(compressed / name, "--format", "peft", "--output", target) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert LoraConfig.from_pretrained(str(tmp_path)) == LoraConfig.from_pretrained(str(compressed / name))


def test_only_one_scaling_can_be_served(compressed, capsys):
    assert export(compressed / "plain", "--format", "peft", "--serving") == 1
    assert "have different scalings, which are part of the trained weights" in error_line(capsys)
    assert export(compressed / "serving", "--format", "peft", "--serving") == 0
    served = json.loads(capsys.readouterr().out)
    assert export(compressed / "serving", "--format", "peft") == 0
    assert json.loads(capsys.readouterr().out) == served
    result = result_of(compressed / "serving")
    assert served["r"] == max(result.ranks.values())
    assert served["lora_alpha"] / served["r"] == pytest.approx(6 / 4)


@pytest.mark.parametrize(
    "change", [{"rank_pattern": {}}, {"alpha_pattern": {"x": 1}}, {"use_rslora": True}, {"r": 99}]
)
def test_export_refuses_an_adapter_config_of_another_compression(compressed, tmp_path, capsys, change):
    folder = shutil.copytree(compressed / "plain", tmp_path / "copy")
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(content | change))
    assert export(folder, "--format", "csv") == 1
    line = error_line(capsys)
    assert "fim_compression.json" in line
    assert line.endswith("Run fim-lora compress again.")


def test_a_damaged_result(compressed, tmp_path, capsys):
    folder = shutil.copytree(compressed / "plain", tmp_path / "copy")
    (folder / "adapter_config.json").unlink()
    assert export(folder, "--format", "csv") == 1
    assert "adapter_config.json: no such file. Run fim-lora compress again." in error_line(capsys)
    content = (folder / "fim_compression.json").read_text()
    (folder / "fim_compression.json").write_text(content.replace('"r_max": null', '"r_max": 1e999'))
    assert main(["show", str(folder)]) == 1
    assert "fim_compression.json is damaged" in error_line(capsys)
