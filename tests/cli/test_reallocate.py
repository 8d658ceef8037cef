"""`fim-lora allocate --scores`: the truth is the allocation of a new calibration, which measures the same scores."""

import json
from dataclasses import replace

import pytest
from peft import LoraConfig

from fim_lora import FimConfig, RankAllocation
from fim_lora_command import main
from helpers.cli_inputs import OUR_FILES, allocate, compress, error_line, files
from helpers.rank_allocations import SCORES, config


def reallocate(scores, output, *options):
    return main(["allocate", *map(str, ("--scores", scores, "--output", output, *options))])


def read(folder):
    """The config as PEFT reads it, and the content of the allocation without its provenance."""
    content = json.loads((folder / "fim_allocation.json").read_text())
    return LoraConfig.from_pretrained(str(folder)).to_dict(), content, content.pop("provenance")


@pytest.mark.parametrize("targets", [[], ["--target-modules", "all-linear"], ["--target-modules", r".*(k|up)_proj"]])
@pytest.mark.parametrize(
    "options",
    [
        ["-r", 16],
        ["-r", 2, "--r-max", 3, "--lora-alpha", 7],
        ["-r", 4, "--r-min", 0, "--budget", "rank", "--score", "mean", "--score-exponent", 2],
        ["--serving"],
    ],
    ids=lambda options: "".join(map(str, options)),
)
@pytest.mark.parametrize("first", [["-r", 4], ["-r", 2, "--r-min", 0, "--score-exponent", 4]], ids=["all", "dropped"])
def test_the_result_is_that_of_a_new_calibration(llama, data, tmp_path, targets, options, first):
    assert allocate(llama, data, tmp_path / "first", *targets, *first) == 0
    assert reallocate(tmp_path / "first", tmp_path / "again", *options) == 0
    assert allocate(llama, data, tmp_path / "fresh", *targets, *options) == 0
    dropped = RankAllocation.load(tmp_path / "first" / "fim_allocation.json").dropped_layers
    assert bool(dropped) == (0 in first), "the case is not what its name says"
    again_config, again, again_provenance = read(tmp_path / "again")
    fresh_config, fresh, fresh_provenance = read(tmp_path / "fresh")
    assert (again_config, again) == (fresh_config, fresh)
    assert files(tmp_path / "again") == OUR_FILES
    first_date = read(tmp_path / "first")[2]["date"]
    reallocated = again_provenance.pop("reallocated")
    assert again_provenance == fresh_provenance | {"date": first_date}
    assert reallocated["scores"] == str(tmp_path / "first")


def test_how_the_scores_were_measured_is_kept(llama, data, tmp_path):
    assert allocate(llama, data, tmp_path / "first", "--exact") == 0
    assert reallocate(tmp_path / "first", tmp_path / "again", "-r", 2) == 0
    fim_config = RankAllocation.load(tmp_path / "again" / "fim_allocation.json").fim_config
    assert fim_config == FimConfig(2, exact=True)


def test_the_summary_says_where_the_scores_come_from(allocated, llama, data, tmp_path, capsys):
    assert reallocate(allocated / "plain", tmp_path / "out", "-r", 4) == 0
    out = capsys.readouterr().out
    for text in (str(llama), "LlamaForCausalLM", str(data), "12 rows", str(allocated / "plain"), "allocated again"):
        assert text in " ".join(out.split())


def write_python_folder(folder, lora_config):
    """An allocation that was saved in Python, without provenance."""
    allocation = RankAllocation.from_scores(SCORES, lora_config)
    folder.mkdir()
    allocation.to_lora_config(lora_config).save_pretrained(folder)
    allocation.save(folder / "fim_allocation.json")


def test_a_folder_from_python(tmp_path):
    lora_config = config(lora_dropout=0.1, use_rslora=True)
    write_python_folder(tmp_path / "python", lora_config)
    assert reallocate(tmp_path / "python", tmp_path / "out", "-r", 4, "--lora-alpha", 8) == 0
    expected = config(lora_dropout=0.1, use_rslora=True, fim_config=FimConfig())
    expected.r, expected.lora_alpha = 4, 8
    allocation = RankAllocation.from_scores(SCORES, expected)
    found = RankAllocation.load(tmp_path / "out" / "fim_allocation.json")
    assert found == replace(allocation, fim_config=found.fim_config)
    written = LoraConfig.from_pretrained(str(tmp_path / "out"))
    assert written.to_dict() | {"peft_version": None} == allocation.to_lora_config(expected).to_dict() | {
        "peft_version": None,
        "inference_mode": written.inference_mode,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_pattern": {"q_proj": 16}}, "was allocated with a rank_pattern or an alpha_pattern"),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 3}}, "was allocated with a rank_pattern or an alpha_pattern"),
        ({"fim_config": FimConfig(r_min=0, score_exponent=3)}, "does not record which targets were given"),
    ],
)
def test_a_folder_that_lacks_something_is_refused(tmp_path, capsys, options, message):
    write_python_folder(tmp_path / "python", config(**options))
    assert reallocate(tmp_path / "python", tmp_path / "out", "-r", 4) == 1
    assert message in error_line(capsys)
    assert files(tmp_path) == ["python"]


def test_a_compression_and_no_folder_at_all_are_refused(adapter, data, tmp_path, capsys):
    assert compress(adapter, data, tmp_path / "small", "--keep", 0.5) == 0
    capsys.readouterr()
    assert reallocate(tmp_path / "small", tmp_path / "out") == 1
    assert "has a compression, not an allocation" in error_line(capsys)
    assert reallocate(tmp_path / "nothing", tmp_path / "out") == 1
    assert "fim_allocation.json: no such file" in error_line(capsys)
    assert files(tmp_path) == ["small"]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--model", "m"), ("--data", "d"), ("--batches", 8), ("--exact", None), ("--task", "seq-cls")],
)
def test_options_of_the_calibration_are_wrong_usage(allocated, tmp_path, capsys, option, value):
    given = [option] if value is None else [option, value]
    assert reallocate(allocated / "plain", tmp_path / "out", *given) == 2
    assert f"{option} has no effect with --scores" in error_line(capsys).replace("'", "")
