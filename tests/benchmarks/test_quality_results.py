"""The result files: their names, and that they are neither overwritten nor confused."""

import json
from dataclasses import asdict, replace

import pytest

import gains
import quality_results
from helpers.benchmark_runs import ResultMaker, make_result


def test_results_in_another_precision_have_a_folder_and_a_setting_of_their_own():
    run = quality_results.Run("sst2", "all-linear", 2, "fim-parameters-1/2", 1e-3, 0, 120)
    assert str(run.file) == "sst2/all-linear-r2-120steps/fim-parameters-1_2-lr0.001-seed0.json"
    half = replace(run, dtype="bfloat16")
    assert str(half.file) == "sst2/all-linear-r2-120steps-bfloat16/fim-parameters-1_2-lr0.001-seed0.json"
    names = [str(gains.setting_of_run({"run": asdict(either)})) for either in (run, half)]
    assert names == ["sst2, all-linear, r = 2, 120 steps", "sst2, all-linear, r = 2, 120 steps, bfloat16"]
    assert gains.setting_of_run(make_result()) == gains.Setting("gsm8k", "all-linear", 2, 40, "float32")


def test_a_result_is_never_overwritten(tmp_path):
    path = tmp_path / "folder" / "result.json"
    quality_results.write(path, {"first": 1})
    with pytest.raises(FileExistsError):
        quality_results.write(path, {"second": 2})
    assert json.loads(path.read_text()) == {"first": 1}
    assert list(path.parent.iterdir()) == [path]


def test_the_names_of_methods_that_begin_alike_are_told_apart(tmp_path):
    results = quality_results.Results(tmp_path, ResultMaker())
    run = quality_results.Run("sst2", "attention", 2, "fim-parameters", 0.0, 0, 40)
    for method, rate, seed in (
        ("fim-parameters", 1e-3, 0),
        ("fim-parameters-1/2", 2e-3, 0),
        ("fim-parameters", 4e-3, 1),
    ):
        other = replace(run, method=method, learning_rate=rate, seed=seed)
        quality_results.write(tmp_path / other.file, make_result(method, rate, seed, loss=rate))
    assert results.known_losses(run) == {1e-3: 1e-3}
    assert results.known_losses(replace(run, method="fim-parameters-1/2")) == {2e-3: 2e-3}
