import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fim_lora.allocation import allocate_ranks, budget_of


def continuous_ranks(scores, costs, lower, upper, total):
    """Independent solution: bisection on λ in plain Python."""
    if total >= sum(c * u for c, u in zip(costs, upper, strict=True)):
        return [float(u) for u in upper]

    def ranks(level):
        return [min(max(level * s, lo), up) for s, lo, up in zip(scores, lower, upper, strict=True)]

    low, high = 0.0, max(up / s for s, up in zip(scores, upper, strict=True) if s > 0)
    for _ in range(300):
        middle = (low + high) / 2
        if sum(c * r for c, r in zip(costs, ranks(middle), strict=True)) > total:
            high = middle
        else:
            low = middle
    return ranks(low)


scores_strategy = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12)
any_scores = st.lists(st.one_of(st.just(0.0), st.floats(1e-30, 1e30)), min_size=1, max_size=30)


def named(values):
    return {f"layer{index:02d}": value for index, value in enumerate(values)}


@settings(max_examples=300, deadline=None)
@given(any_scores, st.integers(1, 12), st.data())
def test_rank_budget_is_used_up_and_bounds_hold(values, r, data):
    r_min = data.draw(st.integers(0, r))
    r_max = data.draw(st.integers(r, 4 * r))
    scores = named(values)
    ranks = allocate_ranks(scores, r, r_min=r_min, r_max=r_max)
    assert list(ranks) == list(scores)
    assert all(r_min <= rank <= r_max for rank in ranks.values())
    # r_min <= r <= r_max, so the bounds always allow it.
    assert sum(ranks.values()) == r * len(scores)


@settings(max_examples=300, deadline=None)
@given(any_scores, st.integers(1, 9), st.data())
def test_parameter_budget_is_never_exceeded(values, r, data):
    scores = named(values)
    sides = st.integers(r, 200)
    shapes = {name: (data.draw(sides), data.draw(sides)) for name in scores}
    exponent = data.draw(st.sampled_from([1.0, 0.5, 1 / 3, 2.0]))
    ranks = allocate_ranks(scores, r, budget="parameters", shapes=shapes, score_exponent=exponent)
    used, allowed = budget_of(ranks, "parameters", shapes), r * sum(map(sum, shapes.values()))
    assert used <= allowed
    assert all(1 <= ranks[name] <= min(4 * r, *shapes[name]) for name in scores)


@settings(max_examples=200, deadline=None)
@given(scores_strategy, st.integers(1, 8), st.booleans(), st.data())
def test_every_rank_is_within_one_of_the_exact_water_filling(values, r, by_parameters, data):
    scores = named(values)
    sides = st.integers(4 * r, 100)
    shapes = {name: (data.draw(sides), data.draw(sides)) for name in scores}
    costs = [sum(shapes[name]) if by_parameters else 1 for name in scores]
    ranks = allocate_ranks(scores, r, budget="parameters" if by_parameters else "rank", shapes=shapes)
    exact = continuous_ranks(values, costs, [1] * len(values), [4 * r] * len(values), r * sum(costs))
    assert all(abs(rank - value) < 1 + 1e-6 for rank, value in zip(ranks.values(), exact, strict=True))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=4), st.integers(1, 4), st.data())
def test_rounding_is_the_brute_force_optimum(values, r, data):
    """Of all integer ranks within the bounds that use the budget, ours are closest to the continuous solution."""
    r_min, r_max = data.draw(st.integers(0, r)), data.draw(st.integers(r, 8))
    ranks = allocate_ranks(named(values), r, r_min=r_min, r_max=r_max)
    count = len(values)
    exact = continuous_ranks(values, [1] * count, [r_min] * count, [r_max] * count, r * count)

    def distance(candidate):
        return sum((rank - value) ** 2 for rank, value in zip(candidate, exact, strict=True))

    possible = itertools.product(range(r_min, r_max + 1), repeat=count)
    best = min(distance(candidate) for candidate in possible if sum(candidate) == r * count)
    assert distance(ranks.values()) <= best + 1e-6


@settings(max_examples=200, deadline=None)
@given(any_scores, st.integers(1, 8), st.booleans(), st.data())
def test_higher_score_never_gets_lower_rank_among_equals(values, r, by_parameters, data):
    scores = named(values)
    kinds = data.draw(st.lists(st.sampled_from([(64, 64), (64, 200), (300, 40)]), min_size=1, max_size=30))
    shapes = {name: kinds[index % len(kinds)] for index, name in enumerate(scores)}
    ranks = allocate_ranks(scores, r, budget="parameters" if by_parameters else "rank", shapes=shapes)
    for one, other in itertools.combinations(scores, 2):
        if shapes[one] == shapes[other] and scores[one] > scores[other]:
            assert ranks[one] >= ranks[other]


@settings(max_examples=200, deadline=None)
@given(any_scores, st.integers(-60, 60), st.integers(1, 8))
def test_scale_of_scores_does_not_matter(values, power, r):
    scores = named(values)
    scaled = {name: value * 2.0**power for name, value in scores.items()}
    assert allocate_ranks(scores, r) == allocate_ranks(scaled, r)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=15), st.floats(0.001, 1000), st.randoms())
def test_order_of_the_dictionary_and_odd_factors_do_not_matter(values, factor, random):
    scores = {name: value * factor for name, value in named(values).items()}
    shuffled = list(scores.items())
    random.shuffle(shuffled)
    ranks = allocate_ranks(scores, 3)
    assert allocate_ranks(dict(shuffled), 3) == ranks
    assert allocate_ranks(named(map(float, values)), 3) == ranks


def test_hand_computed_examples():
    assert allocate_ranks({"a": 3.0, "b": 1.0}, 4) == {"a": 6, "b": 2}
    # λ is solved under the bounds: a is cut off at 8, and what it would have had goes to b and c by their scores.
    assert allocate_ranks({"a": 100.0, "b": 2.0, "c": 1.0}, 4, r_max=8) == {"a": 8, "b": 3, "c": 1}
    assert allocate_ranks({"a": 100.0, "b": 3.0, "c": 1.0}, 5, r_max=7) == {"a": 7, "b": 6, "c": 2}
    # Exponent 1/2: 3 to 1 instead of 9 to 1.
    assert allocate_ranks({"a": 9.0, "b": 1.0}, 4, score_exponent=0.5) == {"a": 6, "b": 2}
    # Ties by name.
    assert allocate_ranks({"b": 1.0, "a": 1.0, "c": 4.0}, 3, r_max=9) == {"b": 1, "a": 2, "c": 6}
    # Parameters: a costs 120 a rank, b 40, the budget is 4 · 160. λ = 8/3 gives a 2.67 and b 8; one more rank of a
    # would cost more than the 80 that are left.
    shapes = {"a": (60, 60), "b": (20, 20)}
    assert allocate_ranks({"a": 1.0, "b": 3.0}, 4, budget="parameters", shapes=shapes) == {"a": 2, "b": 8}


def test_zero_scores_get_r_min_until_the_others_are_full():
    assert allocate_ranks({"a": 1.0, "b": 0.0}, 4) == {"a": 7, "b": 1}
    assert allocate_ranks({"a": 1.0, "b": 0.0, "c": 0.0}, 4, r_max=6) == {"a": 6, "b": 3, "c": 3}
    assert allocate_ranks({"a": 0.0, "b": 0.0}, 4) == {"a": 4, "b": 4}


def test_base_ranks_and_default_r_max():
    ranks = allocate_ranks({"a": 1e9, "b": 1.0}, {"a": 2, "b": 10})
    assert ranks == {"a": 8, "b": 4}
    assert allocate_ranks({"a": 1e9, "b": 1.0, "c": 1.0, "d": 1.0, "e": 1.0}, 8)["a"] == 32


def test_no_rank_exceeds_a_side_of_its_layer():
    ranks = allocate_ranks({"head": 1e6, "body": 1.0}, 8, shapes={"head": (3, 500), "body": (500, 500)})
    assert ranks == {"head": 3, "body": 13}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scores": {}, "r": 4}, "no layers"),
        ({"scores": {"a": -1.0}, "r": 4}, r"'a' is -1\.0"),
        ({"scores": {"a": math.nan, "b": 1.0}, "r": 4}, "'a' is nan"),
        ({"scores": {"b": 1.0, "a": math.inf}, "r": 4}, "'a' is inf"),
        ({"scores": {"a": 1.0}, "r": 4, "r_min": 5}, "'a' has base rank 4, below r_min=5"),
        ({"scores": {"a": 1.0}, "r": 4, "r_max": 3}, "'a' has base rank 4, above r_max=3"),
        ({"scores": {"a": 1.0}, "r": 4, "r_min": -1}, "r_min must not be negative, got -1"),
        ({"scores": {"a": 1.0}, "r": 0}, "'a' must be a positive integer, got 0"),
        ({"scores": {"a": 1.0}, "r": 2.5}, "'a' must be a positive integer, got 2.5"),
        ({"scores": {"a": 1.0, "b": 1.0}, "r": {"a": 4}}, "`r` lacks layer 'b'"),
        ({"scores": {"a": 1.0}, "r": {"a": 4, "z": 4}}, "`r` names 'z'"),
        ({"scores": {"a": 1.0}, "r": 4, "shapes": {"z": (2, 2)}}, "`shapes` lacks layer 'a'"),
        ({"scores": {"a": 1.0}, "r": 4, "r_min": 3, "shapes": {"a": (2, 9)}}, r"'a' of shape \(2, 9\)"),
        ({"scores": {"a": 1.0}, "r": 4, "budget": "parameters"}, "needs `shapes`"),
        ({"scores": {"a": 1.0}, "r": 4, "budget": "layers"}, "budget must be one of"),
        ({"scores": {"a": 1.0}, "r": 4, "score_exponent": 0.0}, "score_exponent must be positive"),
        ({"scores": {"a": 1.0}, "r": 4, "score_exponent": math.nan}, "score_exponent must be positive"),
    ],
)
def test_infeasible_input_is_named(arguments, message):
    arguments = dict(arguments)
    with pytest.raises(ValueError, match=message):
        allocate_ranks(arguments.pop("scores"), arguments.pop("r"), **arguments)


def test_scores_over_many_orders_of_magnitude():
    generator = np.random.default_rng(0)
    scores = named((10.0 ** generator.uniform(-300, 300, 500)).tolist())
    assert sum(allocate_ranks(scores, 8).values()) == 8 * 500


def test_hundred_thousand_layers_cost_no_more_than_their_number_suggests():
    """O(n log n): a quadratic step would take hours here, so finishing is the test."""
    generator = np.random.default_rng(0)
    values = (10.0 ** generator.uniform(-6, 0, 100_000)).tolist()
    scores = {f"layer{index}": value for index, value in enumerate(values)}
    assert sum(allocate_ranks(scores, 8).values()) == 800_000
