"""Steps and adapter parameters that reach the loss of uniform LoRA."""

import math

import pytest

import report
import speeds_and_sizes
from helpers.benchmark_runs import make_result


def loss_curve(*losses):
    return {"curve": [[20 * (place + 1), loss] for place, loss in enumerate(losses)]}


def speeds(*runs):
    return speeds_and_sizes.speeds_by_method([make_result(**loss_curve(2.0, 1.0)), *runs])


def test_steps_to_the_loss_of_uniform_lora_are_interpolated():
    assert speeds(make_result("random", **loss_curve(1.5, 0.5)))["random"].steps == pytest.approx(30)
    assert speeds(make_result("random", **loss_curve(0.9, 0.5)))["random"].steps == 20


def test_a_seed_that_never_gets_there_counts_as_the_whole_training(tmp_path):
    results = [make_result(seed=seed, **loss_curve(2.0, 1.0)) for seed in (0, 1)]
    results += [
        make_result("random", seed=0, **loss_curve(1.0, 0.5)),
        make_result("random", seed=1, **loss_curve(2.0, 1.1)),
    ]
    results += [make_result("inverse", seed=seed, **loss_curve(2.0, 1.1)) for seed in (0, 1)]
    found = speeds_and_sizes.speeds_by_method(results)
    assert found["random"] == (40, 30, 1, 2, 2.0)
    report.write_docs(results, tmp_path)
    text = (tmp_path / "evidence_tables.md").read_text()
    assert "| random | ≥ 30 | 1 of 2 | 2.0 |" in text
    assert "| inverse | – | 0 of 2 | 2.0 |" in text


def test_curves_are_compared_up_to_the_last_step_that_all_have():
    found = speeds(
        make_result("random", **loss_curve(1.5, 0.5, 0.1)), make_result("inverse", **loss_curve(3.0, 2.0, 0.9))
    )
    assert {speed.end for speed in found.values()} == {40}
    assert found["random"].steps == pytest.approx(30)
    assert found["inverse"].reached == 0


def test_times_on_a_gpu_are_not_compared():
    on_gpu = {"environment": {"gpu": "NVIDIA H200"}}
    assert speeds_and_sizes.speeds_by_method([make_result(**on_gpu)])["uniform"].calibration_steps is None
    assert speeds_and_sizes.speeds_by_method([make_result()])["uniform"].calibration_steps == 2


def sized_results(method, rank, loss, parameters, seeds=5):
    return [
        make_result(method, seed=seed, loss=loss + seed - 2, rank=rank, adapter_parameters=parameters, task="sst2")
        for seed in range(seeds)
    ]


def test_parameters_for_a_loss_are_interpolated_in_their_logarithm(tmp_path):
    results = (
        sized_results("uniform", 2, 10, 1000)
        + sized_results("uniform", 4, 8, 2000)
        + sized_results("uniform", 8, 6, 4000)
    )
    # The loss is one nat too high at 1000 parameters and one too low at 4000: the mean of the logarithms is at 2000.
    results += sized_results("fim-rank", 2, 7, 1000) + sized_results("fim-rank", 8, 5, 4000)
    results += (
        sized_results("adalora", 2, 6, 1000)
        + sized_results("adalora", 4, 5, 2000)
        + sized_results("inverse", 2, 5, 1000)
    )
    results += sized_results("random", 2, 9, 1000) + sized_results("random", 8, 7, 4000)
    results += sized_results("lora-ga", 2, 1, 10, seeds=1)
    sizes = speeds_and_sizes.sizes_by_setting(results)["sst2, all-linear, 40 steps"]
    assert sizes["uniform"][8] == (4000, (4, 5, 6, 7, 8), 0.5)
    assert (sizes["uniform"][8].loss, sizes["uniform"][8].error) == (6, pytest.approx(math.sqrt(2.5 / 5)))
    assert speeds_and_sizes.parameters_to_reach([(1000, 7), (4000, 5)], 6) == pytest.approx(2000)

    report.write_docs(results, tmp_path)
    text = (tmp_path / "evidence_tables.md").read_text()
    assert "| uniform | 10.000 (50.0 %) | 8.000 (50.0 %) | 6.000 (50.0 %) | 4,000 | 100% |" in text
    assert "| fim-rank | 7.000 (50.0 %) | – | 5.000 (50.0 %) | 2,000 | 50% [50%, 50%] |" in text
    assert "| adalora | 6.000 (50.0 %) | 5.000 (50.0 %) | – | ≤ 1,000 | ≤ 25% [≤ 25%, 25%] |" in text
    assert "inverse" not in sizes  # a curve needs two ranks
    assert "| random | 9.000 (50.0 %) | – | 7.000 (50.0 %) | – | – |" in text
    assert "lora-ga" not in sizes
    assert (tmp_path / "evidence_parameters.png").read_bytes().startswith(b"\x89PNG")


def test_the_share_of_parameters_has_the_spread_of_the_seeds():
    # Uniform LoRA has the loss 6 at every seed. The method needs 1000 parameters at one seed and 4000 at the other.
    reference = speeds_and_sizes.Size(4000, (6.0, 6.0), 0.5)
    small, large = speeds_and_sizes.Size(1000, (6, 8), 0.5), speeds_and_sizes.Size(4000, (4, 6), 0.5)
    low, high = speeds_and_sizes.parameter_share_interval([small, large], reference)
    assert (low, high) == (pytest.approx(0.25), pytest.approx(1))
    never = [speeds_and_sizes.Size(parameters, (7.0, 7.0), 0.5) for parameters in (1000, 4000)]
    assert speeds_and_sizes.parameter_share_interval(never, reference) == (math.inf, math.inf)


def test_two_ranks_are_no_curve():
    assert (
        speeds_and_sizes.sizes_by_setting(sized_results("uniform", 2, 10, 1000) + sized_results("uniform", 4, 8, 2000))
        == {}
    )
