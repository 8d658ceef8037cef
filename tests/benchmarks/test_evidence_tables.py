"""The tables and pictures of the evidence."""

import pytest

import gains
import report
import report_plots
from helpers.benchmark_runs import make_result


def test_methods_with_few_seeds_have_no_interval_and_are_named():
    results = [make_result(seed=seed, loss=1.0) for seed in range(7)]
    results += [make_result("fim-rank", seed=seed, loss=0.9) for seed in range(5)]
    results += [make_result("random", seed=seed, loss=1.1) for seed in range(4)]
    results += [make_result("lora-ga", loss=1.25), make_result("eva-rho-2", loss=1.125)]
    content = gains.gains_report(results)
    name = "gsm8k, all-linear, r = 2, 40 steps"
    assert set(content["settings"][name]) == set(content["overall"]) == {"uniform", "fim-rank"}
    text = report.as_markdown(content)
    assert "Tuned on one seed only: eva-rho-2 (-0.125), lora-ga (-0.250)." in text
    assert "On 4 seeds only: random (-0.100)." in text
    assert "| lora-ga" not in text


def test_a_method_with_its_best_rate_at_an_end_is_named():
    losses = {1e-3: 1.0, 2e-3: 0.8, 4e-3: 0.9}
    results = [make_result(rate=rate, loss=loss) for rate, loss in losses.items()]
    results += [make_result("random", rate, loss=loss) for rate, loss in losses.items() if rate < 4e-3]
    results += [make_result("inverse", rate=1e-3)]
    content = gains.gains_report(results)
    assert content["not_tuned"] == {"gsm8k, all-linear, r = 2, 40 steps": ["inverse", "random"]}
    assert "is the smallest or the largest that was run: inverse, random." in report.as_markdown(content)


def test_the_overall_table_says_over_how_many_settings_a_mean_is():
    results = [make_result(rank=rank) for rank in (2, 8)]
    results += [
        make_result("fim-rank", loss=0.9),
        make_result("fim-rank", loss=0.8, rank=8),
        make_result("random", loss=0.5, rank=8),
    ]
    content = gains.gains_report(results)
    assert {method: numbers["settings"] for method, numbers in content["overall"].items()} == {
        "uniform": 2, "fim-rank": 2, "random": 1,
    }  # fmt: skip
    assert content["overall"]["fim-rank"]["mean_gain"] == pytest.approx(15)
    rows = [line for line in report.as_markdown(content).splitlines() if line.startswith("| ")][2:5]
    assert [row.split(" | ")[0] for row in rows] == ["| fim-rank", "| uniform", "| random"]
    assert "| 1.000 | 2 | 1 | 2 |" in rows[1]
    assert "| 1.000 | 1 | 1 | 1 |" in rows[2]


def test_the_learning_rate_table_says_what_half_and_twice_the_best_cost(tmp_path):
    losses = {1e-3: 1.0, 2e-3: 0.8, 4e-3: 0.75, 8e-3: 0.9}
    results = [make_result(rate=rate, loss=loss, test_loss=2 * loss) for rate, loss in losses.items()]
    results += [make_result(rate=4e-3, seed=1, loss=9.0), make_result("fim-rank", rate=8e-3, loss=0.5)]
    report.write_docs(results, tmp_path)
    text = (tmp_path / "evidence_tables.md").read_text()
    assert "| method | 0.001 | 0.002 | 0.004 | 0.008 | at half the best | at twice the best |" in text
    assert "| uniform | 2.000 | 1.600 | 1.500 | 1.800 | +0.100 | +0.300 |" in text
    assert "| fim-rank | – | – | – | 0.500 | – | – |" in text


def test_exact_matches_are_the_mean_over_the_seeds_that_have_them(tmp_path):
    results = [make_result(seed=seed) for seed in range(3)]
    for result, share in zip(results[1:], (0.25, 0.5), strict=True):
        result["test"] |= {"exact_match": share, "exact_match_examples": 32}
    report.write_docs([*results, *(make_result("random", seed=seed) for seed in range(3))], tmp_path)
    text = (tmp_path / "evidence_tables.md").read_text()
    table = text[text.index("### Exact match: gsm8k") :]
    assert "| uniform | 37.5% | 64 | 2 |" in table
    assert "random" not in table


def test_the_documents_have_every_method_and_a_picture(tmp_path):
    results = [make_result(), make_result("fim-rank", loss=0.9), make_result("random", loss=1.1)]
    results += [make_result(rank=8), make_result(rank=4), make_result("fim-rank", loss=0.9, rank=4)]
    report.write_docs(results, tmp_path)
    text = (tmp_path / "evidence_tables.md").read_text()
    assert "| fim-rank | +10.00 [+10.00, +10.00] |" in text
    assert "| fim-rank | 40 | 1 of 1 | 2.0 |" in text
    assert "### Exact match" not in text
    assert (tmp_path / "evidence_gains.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_has_a_panel_for_each_short_task_and_rank(tmp_path):
    numbers = {"mean_loss_gain": 0.1, "loss_ci95": [0.0, 0.2]}
    other = {"mean_loss_gain": -0.1, "loss_ci95": [-0.2, 0.0]}
    settings = {
        "gsm8k, all-linear, r = 2, 40 steps": {"uniform": numbers, "fim-rank": numbers},
        "gsm8k, all-linear, r = 2, 40 steps, bfloat16": {"cut": other, "fim-rank": other},
        "german, all-linear, r = 2, 100 steps, bfloat16": {"cut": numbers},
        "banking77, attention, r = 2, 120 steps": {"cut": numbers},
        "banking77-long, all-linear, r = 8, 400 steps, bfloat16": {"fim-rank": numbers},
        "sst2, all-linear, r = 2, 120 steps": {"random": numbers},
    }
    assert report_plots._panels(settings) == {
        "GSM8K\nr = 2": {"fim-rank": numbers, "cut": other},
        "German text\nr = 2": {"cut": numbers},
    }
    report_plots.plot_gains(settings, tmp_path / "gains.png")
    assert (tmp_path / "gains.png").read_bytes().startswith(b"\x89PNG")
