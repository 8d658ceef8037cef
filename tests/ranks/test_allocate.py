"""`allocate_ranks`: budgets, bounds, rounding and steps."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fim_lora.ranks.allocate import allocate_ranks, budget_of


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
    costs = {name: sum(shape) for name, shape in shapes.items()}
    used, allowed = budget_of(ranks, "parameters", costs), r * sum(costs.values())
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
    """Of all integer ranks within the bounds that use the budget, the result is closest to the continuous solution."""
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
    # λ is solved under the bounds: a is cut off at 8, and its remaining share goes to b and c by their scores.
    assert allocate_ranks({"a": 100.0, "b": 2.0, "c": 1.0}, 4, r_max=8) == {"a": 8, "b": 3, "c": 1}
    assert allocate_ranks({"a": 100.0, "b": 3.0, "c": 1.0}, 5, r_max=7) == {"a": 7, "b": 6, "c": 2}
    # Exponent 1/2: 3 to 1 instead of 9 to 1.
    assert allocate_ranks({"a": 9.0, "b": 1.0}, 4, score_exponent=0.5) == {"a": 6, "b": 2}
    # Ties are broken by name.
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
        ({"scores": {"a": 1.0}, "r": 4, "r_min": 1.5}, "r_min must be an integer, got 1.5"),
        ({"scores": {"a": 1.0}, "r": 4, "r_max": 12.9}, "r_max must be an integer, got 12.9"),
        ({"scores": {"a": 1.0}, "r": 4, "r_max": True}, "r_max must be an integer, got True"),
        ({"scores": {"a": 1.0}, "r": 0}, "'a' must be a positive integer, got 0"),
        ({"scores": {"a": 1.0}, "r": 2.5}, "'a' must be a positive integer, got 2.5"),
        ({"scores": {"a": 1.0, "b": 1.0}, "r": {"a": 4}}, "`r` lacks layer 'b'"),
        ({"scores": {"a": 1.0}, "r": {"a": 4, "z": 4}}, "`r` names 'z'"),
        ({"scores": {"a": 1.0}, "r": 4, "shapes": {"z": (2, 2)}}, "`shapes` lacks layer 'a'"),
        ({"scores": {"a": 1.0}, "r": 4, "r_min": 3, "shapes": {"a": (2, 9)}}, r"'a' of shape \(2, 9\)"),
        ({"scores": {"a": 1.0}, "r": 4, "budget": "parameters"}, "needs `parameters_per_rank` or `shapes`"),
        (
            {"scores": {"a": 1.0}, "r": 4, "budget": "parameters", "shapes": {"z": (2, 2)}},
            "`shapes` lacks layer 'a'",
        ),
        (
            {"scores": {"a": 1.0}, "r": 4, "budget": "parameters", "parameters_per_rank": {"z": 2}},
            "`parameters_per_rank` lacks layer 'a'",
        ),
        (
            {"scores": {"a": 1.0}, "r": 4, "budget": "parameters", "parameters_per_rank": {"a": 0}},
            "`parameters_per_rank` of layer 'a' must be a positive integer, got 0",
        ),
        ({"scores": {"a": 1.0}, "r": 4, "rank_steps": {}}, "`rank_steps` lacks layer 'a'"),
        ({"scores": {"a": 1.0}, "r": 4, "rank_steps": {"a": 1.5}}, "`rank_steps` of layer 'a' .* got 1.5"),
        (
            {"scores": {"a": 1.0}, "r": 6, "rank_steps": {"a": 4}},
            "'a' has base rank 6, but its rank must be a multiple of 4: .* rank_pattern",
        ),
        (
            {"scores": {"a": 1.0}, "r": 4, "rank_steps": {"a": 4}, "shapes": {"a": (3, 9)}, "r_min": 0},
            r"'a' of shape \(3, 9\) cannot have rank 4 or more in steps of 4",
        ),
        ({"scores": {"a": 1.0}, "r": 4, "budget": "layers"}, "budget must be one of"),
        ({"scores": {"a": 1.0}, "r": 4, "score_exponent": 0.0}, "score_exponent must be positive"),
        ({"scores": {"a": 1.0}, "r": 4, "score_exponent": math.nan}, "score_exponent must be positive"),
    ],
)
def test_infeasible_input_is_named(arguments, message):
    arguments = dict(arguments)
    with pytest.raises(ValueError, match=message):
        allocate_ranks(arguments.pop("scores"), arguments.pop("r"), **arguments)


@st.composite
def stepped_problems(draw, most_layers=10, largest_factor=4):
    """Layers whose ranks have steps: scores, and the options of `allocate_ranks`."""
    scores = named(draw(st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 1e9)), min_size=1, max_size=most_layers)))
    # Few kinds of layer, so that there are equal ones to compare.
    kind = st.tuples(st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 3), st.integers(1, 300), st.integers(0, 20))
    kinds = draw(st.lists(kind, min_size=1, max_size=3))
    layers = {name: draw(st.sampled_from(kinds)) for name in scores}
    base_ranks = {name: step * factor for name, (step, factor, _, _) in layers.items()}
    options = {
        "r": base_ranks,
        "r_min": draw(st.integers(0, min(base_ranks.values()))),
        "r_max": draw(st.one_of(st.none(), st.integers(max(base_ranks.values()), largest_factor * 24))),
        "budget": draw(st.sampled_from(["rank", "parameters"])),
        "shapes": {name: (base_ranks[name] + room, 400) for name, (_, _, _, room) in layers.items()},
        "parameters_per_rank": {name: cost for name, (_, _, cost, _) in layers.items()},
        "rank_steps": {name: step for name, (step, _, _, _) in layers.items()},
    }
    return scores, options


def upper_bounds(options):
    """The largest multiple of its step that a layer may have, by trying them."""
    most = {
        name: min(4 * rank if options["r_max"] is None else options["r_max"], *options["shapes"][name])
        for name, rank in options["r"].items()
    }
    steps = options["rank_steps"]
    return {name: max(rank for rank in range(most[name] + 1) if rank % steps[name] == 0) for name in most}


def left_of_budget(ranks, options):
    costs = options["parameters_per_rank"] if options["budget"] == "parameters" else dict.fromkeys(ranks, 1)
    return sum(costs[name] * (options["r"][name] - rank) for name, rank in ranks.items())


@settings(max_examples=500, deadline=None)
@given(stepped_problems())
def test_steps_bounds_and_budget_hold(problem):
    scores, options = problem
    ranks, upper = allocate_ranks(scores, **options), upper_bounds(options)
    assert list(ranks) == list(scores)
    for name, rank in ranks.items():
        assert rank % options["rank_steps"][name] == 0
        assert options["r_min"] <= rank <= upper[name]
    assert left_of_budget(ranks, options) >= 0


@settings(max_examples=500, deadline=None)
@given(stepped_problems())
def test_no_step_of_a_layer_with_room_fits_into_what_is_left(problem):
    scores, options = problem
    ranks, upper = allocate_ranks(scores, **options), upper_bounds(options)
    left, steps = left_of_budget(ranks, options), options["rank_steps"]
    with_room = [name for name in ranks if ranks[name] < upper[name]]
    if options["budget"] == "rank":
        # A layer of step 1 with room thus means that nothing is left.
        assert all(left < steps[name] for name in with_room)
    elif with_room:
        assert left < max(steps[name] * options["parameters_per_rank"][name] for name in ranks)


@settings(max_examples=500, deadline=None)
@given(stepped_problems())
def test_higher_score_never_gets_lower_rank_among_equals_with_steps(problem):
    scores, options = problem
    ranks, upper = allocate_ranks(scores, **options), upper_bounds(options)
    for one, other in itertools.permutations(scores, 2):
        equal = upper[one] == upper[other] and all(
            options[key][one] == options[key][other] for key in ("rank_steps", "parameters_per_rank")
        )
        if equal and scores[one] > scores[other]:
            assert ranks[one] >= ranks[other]


@settings(max_examples=200, deadline=None)
@given(stepped_problems(), st.integers(-60, 60), st.randoms())
def test_scale_and_order_do_not_matter_with_steps(problem, power, random):
    scores, options = problem
    ranks = allocate_ranks(scores, **options)
    names = list(scores)
    random.shuffle(names)
    assert allocate_ranks({name: scores[name] * 2.0**power for name in names}, **options) == ranks


@settings(max_examples=300, deadline=None)
@given(any_scores, st.integers(1, 8), st.sampled_from([2, 4, 8]), st.data())
def test_a_step_that_all_layers_share_is_a_unit(values, r, step, data):
    r_min, r_max = data.draw(st.integers(0, r)), data.draw(st.integers(r, 4 * r))
    scores = named(values)
    in_units = allocate_ranks(scores, r, r_min=r_min, r_max=r_max)
    steps = dict.fromkeys(scores, step)
    # Bounds that are not multiples mean the multiples inside of them.
    below, above = data.draw(st.integers(0, step - 1)), data.draw(st.integers(0, step - 1))
    bounds = {"r_min": max(step * r_min - below, 0), "r_max": step * r_max + above}
    ranks = allocate_ranks(scores, step * r, rank_steps=steps, **bounds)
    assert ranks == {name: step * rank for name, rank in in_units.items()}
    assert allocate_ranks(scores, r, r_min=r_min, r_max=r_max, rank_steps=dict.fromkeys(scores, 1)) == in_units


@settings(max_examples=300, deadline=None)
@given(scores_strategy, st.integers(1, 3), st.sampled_from([2, 3, 4]), st.data())
def test_the_largest_step_is_rounded_within_its_share(values, factor, step, data):
    """Every layer of the largest step is within one step of the exact solution, and their sum is not above it."""
    scores = named(values)
    steps = {name: data.draw(st.sampled_from([1, step])) for name in scores}
    base_rank = step * factor
    ranks = allocate_ranks(scores, base_rank, rank_steps=steps)
    lower = [steps[name] for name in scores]
    count = len(values)
    exact = continuous_ranks(values, [1] * count, lower, [4 * base_rank] * count, base_rank * count)
    exact = dict(zip(scores, exact, strict=True))
    largest = [name for name in scores if steps[name] == step]
    assert all(abs(ranks[name] - exact[name]) < step + 1e-6 for name in largest)
    assert sum(ranks[name] for name in largest) <= sum(exact[name] for name in largest) + 1e-6


def test_hand_computed_steps():
    # λ = 8 / 4: a would have 6 and gets 4; the saved ranks go to b.
    assert allocate_ranks({"a": 3.0, "b": 1.0}, 4, rank_steps={"a": 4, "b": 1}) == {"a": 4, "b": 4}
    # The bounds 1 and 7 mean 4 and 4 for a, so 2 of 8 are left for b and 2 for c.
    ranks = allocate_ranks(
        {"a": 9.0, "b": 1.0, "c": 1.0}, {"a": 4, "b": 2, "c": 2}, r_max=7, rank_steps={"a": 4, "b": 1, "c": 1}
    )
    assert ranks == {"a": 4, "b": 2, "c": 2}
    # b is at its lower bound, so λ = 10 / 4: a would have 7.5, b 4 and c 2.5. a and b may spend 11.5, that is two
    # steps of 4; c gets the 6 that are left.
    ranks = allocate_ranks(
        {"a": 3.0, "b": 1.0, "c": 1.0}, {"a": 4, "b": 4, "c": 6}, rank_steps={"a": 4, "b": 4, "c": 2}
    )
    assert ranks == {"a": 4, "b": 4, "c": 6}
    # Parameters: 4 · 10 + 4 · 1. a would have 4.19 and is rounded to 4, b gets the 4 left.
    ranks = allocate_ranks(
        {"a": 2.0, "b": 1.0},
        4,
        budget="parameters",
        parameters_per_rank={"a": 10, "b": 1},
        rank_steps={"a": 4, "b": 1},
    )
    assert ranks == {"a": 4, "b": 4}


def test_parameters_per_rank_go_before_shapes():
    shapes = {"a": (60, 60), "b": (20, 20)}
    by_shapes = allocate_ranks({"a": 1.0, "b": 3.0}, 4, budget="parameters", shapes=shapes)
    costs = {"a": 120, "b": 40}
    swapped = dict.fromkeys(shapes, (50, 50))
    by_costs = allocate_ranks({"a": 1.0, "b": 3.0}, 4, budget="parameters", shapes=swapped, parameters_per_rank=costs)
    assert by_costs == by_shapes
    assert budget_of(by_costs, "parameters", costs) == 2 * 120 + 8 * 40
    assert budget_of(by_costs, "rank") == 10
    with pytest.raises(ValueError, match="needs `parameters_per_rank`"):
        budget_of(by_costs, "parameters")


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
