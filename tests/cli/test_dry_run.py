"""`fim-lora allocate --dry-run`."""

import json

import pytest
from transformers import AutoModelForCausalLM

from fim_lora.cli import run_facts
from fim_lora_command import main
from helpers.cli_inputs import OUR_FILES, allocate, error_line, files


def dry_run(model, data, *options):
    fixed = ["--model", model, "--data", data, "--batches", 2, "--batch-size", 2, "--dry-run"]
    return main(["allocate", *map(str, (*fixed, *options))])


@pytest.mark.parametrize("options", [[], ["-r", 4, "--budget", "rank"], ["--target-modules", "all-linear"]])
def test_targets_and_sizes_are_those_of_the_run(llama, data, tmp_path, capsys, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    assert dry_run(llama, data, *options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert files(tmp_path) == []
    assert allocate(llama, data, tmp_path / "out", *options) == 0
    written = json.loads((tmp_path / "out" / "fim_allocation.json").read_text())
    assert found["targets"] == list(written["ranks"])
    assert (found["budget"], found["r"]) == (written["budget"], written["r"])
    assert found["num_batches"] == 2
    weights = dict(AutoModelForCausalLM.from_pretrained(llama).named_modules())
    sides = [sum(weights[name].weight.shape) for name in found["targets"]]
    assert found["num_parameters_uniform"] == written["r"] * sum(sides)


def test_the_expected_time_is_that_of_the_first_batch_times_the_batches(llama, data, capsys, monkeypatch):
    times = iter(range(0, 1000, 3))  # each stage takes 3 s
    monkeypatch.setattr(run_facts.time, "perf_counter", lambda: float(next(times)))
    assert dry_run(llama, data, "--batches", 100, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_batches"] == 6  # of two examples, of which the data has twelve
    assert found["seconds"]["first batch"] == 3
    assert found["expected_calibration_seconds"] == 18


def test_the_text_says_it_all_and_ends_with_what_comes_next(llama, data, tmp_path, capsys):
    assert dry_run(llama, data, "--target-modules", "all-linear", "--output", tmp_path / "out") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    text = " ".join(captured.out.split())
    for part in ("14 layers: 2 q_proj,", str(llama), "12 rows", "uniform rank 8", "2 batches like the first"):
        assert part in text
    assert captured.out.splitlines()[-1] == "Nothing was written. Next: the same command without --dry-run"
    assert files(tmp_path) == []


def test_what_the_run_would_refuse_is_refused(llama, data, allocated, tmp_path, capsys):
    assert dry_run(llama, data, "--output", allocated / "plain") == 1
    assert "is not empty" in error_line(capsys)
    assert dry_run(llama, data, "--target-modules", "nothing") == 1
    assert error_line(capsys)
    assert main(["allocate", "--scores", str(allocated / "plain"), "--dry-run"]) == 2
    assert "--dry-run has no effect with --scores" in error_line(capsys)
    assert files(allocated / "plain") == OUR_FILES
