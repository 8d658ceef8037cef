"""The choice of the learning rate."""

import math

import pytest

import learning_rates
from helpers.benchmark_runs import make_result


@pytest.mark.parametrize(
    ("best", "known", "extra_rates", "run", "chosen"),
    [
        (2.2e-3, {}, 4, [1e-3, 2e-3, 4e-3], 2e-3),
        (9e-3, {}, 4, [1e-3, 2e-3, 4e-3, 8e-3, 16e-3], 8e-3),
        (0.6e-3, {}, 4, [1e-3, 2e-3, 4e-3, 0.5e-3, 0.25e-3], 0.5e-3),
        (1.0, {}, 4, [1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3, 64e-3], 64e-3),
        (1.0, {}, 0, [1e-3, 2e-3, 4e-3], 4e-3),
        (9e-3, {2e-3, 8e-3}, 4, [1e-3, 4e-3, 16e-3], 8e-3),
        (1.0, {8e-3, 16e-3}, 3, [1e-3, 2e-3, 4e-3, 32e-3], 32e-3),
    ],
)
def test_a_learning_rate_is_looked_for_beyond_the_end_of_the_grid(best, known, extra_rates, run, chosen):
    tried = []

    def loss_of(rate):
        tried.append(rate)
        return abs(math.log(rate / best))

    losses = {rate: abs(math.log(rate / best)) for rate in known}
    assert learning_rates.tuned_rate(losses, [1e-3, 2e-3, 4e-3], extra_rates, loss_of) == chosen
    assert tried == run


def test_a_learning_rate_that_diverged_is_not_the_best():
    losses = {1e-3: 1.0, 2e-3: math.nan, 4e-3: math.nan}
    assert learning_rates.best_rate(losses) == 1e-3
    assert learning_rates.best_rate({2e-3: math.nan, 1e-3: math.inf, 4e-3: 5.0}) == 4e-3


def test_the_learning_rate_is_the_best_one_of_the_first_seed_however_many_seeds_it_has():
    results = [make_result(rate=rate, seed=3, loss=loss) for rate, loss in ((1e-3, 1.0), (2e-3, 0.8), (4e-3, 0.9))]
    # These seeds would choose another rate, but were run with one rate only. The smallest seed is among them.
    results += [make_result(rate=1e-3, seed=seed, loss=0.1) for seed in (1, 2, 4, 5, 6)]
    results += [make_result(rate=2e-3, seed=1, loss=5.0)]
    chosen = learning_rates.chosen_runs(results)["uniform"]
    assert sorted(chosen) == [1, 3]
    assert {run["run"]["learning_rate"] for run in chosen.values()} == {2e-3}


def test_of_seeds_with_equally_many_learning_rates_the_smallest_is_the_first():
    results = [
        make_result(rate=rate, seed=seed, loss=rate if seed else -rate) for rate in (1e-3, 2e-3) for seed in (0, 1)
    ]
    assert learning_rates.sweeps_by_method(results)["uniform"].best == 2e-3
