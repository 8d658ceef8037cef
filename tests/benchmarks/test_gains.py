"""Gains over uniform LoRA: pairing by seed, and means over settings and tasks."""

import pathlib

import pytest

import gains
from helpers.benchmark_runs import make_result


def test_the_learning_rate_is_chosen_on_the_development_split_and_the_gain_comes_from_the_test_split():
    results = [make_result(test_loss=2.0)]
    results += [
        make_result("fim-rank", 1e-3, loss=1.0, test_loss=0.1),
        make_result("fim-rank", 2e-3, loss=0.8, test_loss=1.5),
    ]
    numbers = gains.gains_report(results)["settings"]["gsm8k, all-linear, r = 2, 40 steps"]["fim-rank"]
    assert numbers["mean_gain"] == pytest.approx(0.5)
    assert gains.gains_report(results)["overall"]["fim-rank"]["mean_gain"] == pytest.approx(25)


def test_gains_are_paired_by_seed():
    results = [make_result(seed=seed, loss=seed) for seed in range(1, 7)]
    results += [make_result("fim-rank", seed=seed, loss=seed - 0.25) for seed in range(2, 8)]
    numbers = gains.gains_report(results)["overall"]["fim-rank"]
    assert numbers["runs"] == 5
    assert numbers["mean_loss_gain"] == pytest.approx(0.25)
    assert numbers["loss_ci95"] == pytest.approx([0.25, 0.25])  # the seeds differ, the paired gains do not


def test_where_all_have_two_seeds_two_are_enough():
    results = [
        make_result(method, seed=seed, loss=loss)
        for method, loss in (("uniform", 1), ("random", 2))
        for seed in (0, 1)
    ]
    results += [make_result("fim-rank", loss=0.5)]
    assert set(gains.gains_report(results)["overall"]) == {"uniform", "random"}


def test_overall_every_task_counts_once_however_many_settings_it_has():
    results = [make_result(rank=rank) for rank in (2, 8)] + [make_result(task="sst2")]
    results += [
        make_result("random", loss=0.9),
        make_result("random", loss=0.7, rank=8),
        make_result("random", task="sst2"),
    ]
    content = gains.gains_report(results)
    assert content["tasks"]["gsm8k"]["random"]["mean_gain"] == pytest.approx(0.2)
    assert content["tasks"]["sst2"]["random"]["mean_gain"] == pytest.approx(0)
    assert content["overall"]["random"]["mean_gain"] == pytest.approx(10)


def test_settings_of_a_task_share_their_seeds():
    # At each seed, one setting loses as much as the other gains, so the mean of both has no spread.
    results = [make_result(seed=seed, rank=rank) for seed in range(5) for rank in (2, 8)]
    results += [make_result("random", seed=seed, loss=0.5 + seed / 10) for seed in range(5)]
    results += [make_result("random", seed=seed, loss=0.9 - seed / 10, rank=8) for seed in range(5)]
    assert gains.gains_report(results)["tasks"]["gsm8k"]["random"]["ci95"] == pytest.approx([0.3, 0.3])


def test_more_accuracy_is_a_gain_in_points():
    better = make_result("eva-rho-2", task="sst2")
    better["test"] = {"loss": 1.0, "accuracy": 0.53}
    numbers = gains.gains_report([make_result(task="sst2"), better])["settings"]["sst2, all-linear, r = 2, 40 steps"]
    assert numbers["eva-rho-2"]["mean_gain"] == pytest.approx(3)


def test_precisions_are_not_compared_with_each_other():
    half = make_result("fim-rank", loss=0.5)
    half["run"]["dtype"] = "bfloat16"
    reference = make_result(loss=0.75)
    reference["run"]["dtype"] = "bfloat16"
    settings = gains.gains_report([make_result(), make_result("fim-rank", loss=0.9), reference, half])["settings"]
    assert settings["gsm8k, all-linear, r = 2, 40 steps"]["fim-rank"]["mean_loss_gain"] == pytest.approx(0.1)
    half_precision = settings["gsm8k, all-linear, r = 2, 40 steps, bfloat16"]
    assert half_precision["fim-rank"]["mean_loss_gain"] == pytest.approx(0.25)


def test_another_reference_is_compared_with_seed_by_seed_where_it_was_run():
    runs = [make_result(method, seed=seed, test_loss=loss + 0.1 * seed) for seed in range(5)
            for method, loss in (("uniform", 3.0), ("random", 2.5), ("fim-rank", 2.25))]  # fmt: skip
    elsewhere = [make_result(method, seed=seed, rank=8) for seed in range(5) for method in ("uniform", "fim-rank")]
    content = gains.gains_report(runs + elsewhere, "random")
    (only,) = content["settings"].values()
    assert only["fim-rank"]["mean_loss_gain"] == pytest.approx(0.25)
    assert only["uniform"]["loss_ci95"] == pytest.approx([-0.5, -0.5])
    assert len(gains.gains_report(runs + elsewhere)["settings"]) == 2


def test_the_results_of_the_project_are_read_whatever_their_age():
    results = gains.read_results(pathlib.Path(gains.__file__).parent / "results" / "quality")
    assert any("dtype" not in result["run"] for result in results)
    content = gains.gains_report(results)
    assert {"mean_gain", "ci95", "params_ratio", "runs"} <= content["overall"]["fim-rank"].keys()
    assert "banking77, all-linear, r = 2, 120 steps" in content["settings"]
    assert {"banking77", "sst2", "gsm8k"} <= content["tasks"].keys()
