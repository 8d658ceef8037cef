"""The command `quality.py`: which runs it makes, in which order, and the defaults of its options."""

import argparse

import pytest

import quality
import quality_methods
import quality_results
import quality_training
from helpers.benchmark_runs import ResultMaker


def parse_gsm8k_options(folder, *more):
    return quality.parse_options(
        ["--data", "", "--results", str(folder), "--tasks", "gsm8k", "--targets", "all-linear", "--steps", "40", *more]
    )


def test_every_method_is_tuned_on_the_first_seed_and_run_with_its_best_rate_on_the_others(tmp_path):
    options = parse_gsm8k_options(
        tmp_path, "--ranks", "2", "--methods", "uniform", "fim-rank", "--seeds", "3", "1", "2"
    )
    tuning = [("uniform", rate, 3, True) for rate in (1e-3, 2e-3, 4e-3, 8e-3)]
    tuning += [("fim-rank", rate, 3, True) for rate in (1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3)]
    rest = [
        (method, rate, seed, False) for seed in (1, 2) for method, rate in (("uniform", 2e-3), ("fim-rank", 16e-3))
    ]

    maker = ResultMaker()
    quality.run_all(
        argparse.Namespace(**vars(options) | {"tuning_only": True}), quality_results.Results(tmp_path, maker)
    )
    assert maker.made == tuning
    quality.run_all(options, quality_results.Results(tmp_path, maker))
    assert maker.made == tuning + rest
    quality.run_all(options, quality_results.Results(tmp_path, maker))
    assert maker.made == tuning + rest

    for file in tmp_path.rglob("fim-rank-lr0.004-*.json"):
        file.unlink()
    quality.run_all(options, quality_results.Results(tmp_path, maker))
    assert maker.made == [*tuning, *rest, ("fim-rank", 4e-3, 3, True)]


@pytest.mark.parametrize("parts", [1, 2, 3, 50])
def test_shares_have_whole_methods_and_all_of_them_once(parts, tmp_path):
    dealt = []
    for part in range(1, parts + 1):
        for runs in quality.shared_settings(parse_gsm8k_options(tmp_path, "--share", f"{part}/{parts}")):
            assert len({run.file.parent for run in runs}) == 1
            dealt += runs
    assert len(dealt) == len(set(dealt)) == 2 * len(quality_methods.METHODS)
    assert {(run.learning_rate, run.seed) for run in dealt} == {(0.0, 0)}


def test_a_single_seed_is_no_tuning_alone(tmp_path):
    maker = ResultMaker()
    options = parse_gsm8k_options(tmp_path, "--ranks", "2", "--methods", "uniform", "--seeds", "7")
    quality.run_all(options, quality_results.Results(tmp_path, maker))
    assert {(seed, tuning) for _, _, seed, tuning in maker.made} == {(7, False)}


def test_the_quick_grid_needs_no_other_option_and_gives_way_to_those_given():
    options = quality.parse_options(["--data", "folder", "--quick"])
    assert options.results.name == "quality-quick"
    assert (options.tasks, options.steps, options.seeds) == (["banking77"], 60, [0, 1])
    assert set(options.methods) <= set(quality_training.METHODS)
    assert quality.parse_options(["--data", "folder", "--quick", "--steps", "5"]).steps == 5
    assert quality.parse_options(["--data", "folder"]).results.name == "quality"
