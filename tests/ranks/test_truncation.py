"""Which components are kept: properties, and the best set of all by brute force."""

from collections import Counter
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fim_lora.ranks.truncation import Component, agreement, by_layer, keep_within, order_of_components

SETTINGS = settings(max_examples=60, deadline=None)


@st.composite
def instances(draw, max_layers=4, max_components=4):
    """Saliencies and costs of some layers; integers, so that sums are exact and ties occur."""
    names = [f"layers.{place}" for place in range(draw(st.integers(1, max_layers)))]
    saliencies = {
        name: draw(st.lists(st.integers(0, 12).map(float), min_size=1, max_size=max_components)) for name in names
    }
    return saliencies, {name: draw(st.integers(1, 6)) for name in names}


def total_cost(saliencies, costs):
    return sum(len(of_layer) * costs[name] for name, of_layer in saliencies.items())


def value_of(kept, saliencies):
    return sum(saliencies[layer][number] for layer, number in kept)


def cost_of(kept, costs):
    return sum(costs[layer] for layer, _ in kept)


def best_value(saliencies, costs, budget, caps=None):
    """The largest sum of saliencies of all sets of components that fit, by trying all numbers kept in each layer."""
    best = 0.0
    most = {name: len(of_layer) if caps is None else caps[name] for name, of_layer in saliencies.items()}
    choices = [range(min(len(of_layer), most[name]) + 1) for name, of_layer in saliencies.items()]
    for counts in product(*choices):
        if sum(count * costs[name] for count, name in zip(counts, saliencies, strict=True)) <= budget:
            values = (
                sum(sorted(saliencies[name], reverse=True)[:count])
                for count, name in zip(counts, saliencies, strict=True)
            )
            best = max(best, sum(values))
    return best


@SETTINGS
@given(instances(), st.data())
def test_the_kept_set_is_the_best_one_up_to_one_component(instance, data):
    saliencies, costs = instance
    budget = data.draw(st.integers(0, total_cost(saliencies, costs)))
    caps = data.draw(st.none() | st.fixed_dictionaries({name: st.integers(0, 4) for name in saliencies}))
    order = order_of_components(saliencies, costs)
    kept = keep_within(order, costs, budget, caps)
    assert cost_of(kept, costs) <= budget
    best = best_value(saliencies, costs, budget, caps)
    one = max(value for of_layer in saliencies.values() for value in of_layer)
    assert best - one <= value_of(kept, saliencies) <= best


@SETTINGS
@given(instances(), st.integers(1, 5))
def test_with_equal_costs_the_kept_set_is_the_best_one(instance, cost):
    saliencies, _ = instance
    costs = dict.fromkeys(saliencies, cost)
    for budget in range(total_cost(saliencies, costs) + 1):
        kept = keep_within(order_of_components(saliencies, costs), costs, budget)
        assert value_of(kept, saliencies) == best_value(saliencies, costs, budget)


@SETTINGS
@given(instances(max_layers=6, max_components=6), st.data())
def test_a_larger_budget_never_keeps_less_saliency(instance, data):
    saliencies, costs = instance
    caps = data.draw(st.none() | st.fixed_dictionaries({name: st.integers(0, 6) for name in saliencies}))
    order = order_of_components(saliencies, costs)
    values = [
        value_of(keep_within(order, costs, budget, caps), saliencies)
        for budget in range(total_cost(saliencies, costs) + 1)
    ]
    assert values == sorted(values)


@SETTINGS
@given(instances(max_layers=6, max_components=6), st.data())
def test_budget_caps_and_least_numbers(instance, data):
    saliencies, costs = instance
    at_least = data.draw(st.fixed_dictionaries({}, optional={name: st.integers(0, 3) for name in saliencies}))
    caps = data.draw(st.none() | st.fixed_dictionaries({name: st.integers(0, 6) for name in saliencies}))
    budget = data.draw(st.integers(0, total_cost(saliencies, costs) + 5))
    order = order_of_components(saliencies, costs, at_least)
    assert sorted(order) == sorted(
        Component(name, number) for name, of_layer in saliencies.items() for number in range(len(of_layer))
    )
    kept = keep_within(order, costs, budget, caps)
    assert len(set(kept)) == len(kept)
    assert cost_of(kept, costs) <= budget
    counts = Counter(component.layer for component in kept)
    if caps is not None:
        assert all(counts[name] <= cap for name, cap in caps.items())
    required = {name: min(at_least.get(name, 0), len(of_layer)) for name, of_layer in saliencies.items()}
    if caps is None and sum(number * costs[name] for name, number in required.items()) <= budget:
        assert all(counts[name] >= number for name, number in required.items())
    # Whatever is left out has no room, or its layer is full.
    for component in set(order) - set(kept):
        is_full = caps is not None and counts[component.layer] >= caps[component.layer]
        assert is_full or costs[component.layer] > budget - cost_of(kept, costs)


@SETTINGS
@given(instances(max_layers=6, max_components=6))
def test_a_layer_keeps_its_most_salient_components(instance):
    saliencies, costs = instance
    order = order_of_components(saliencies, costs)
    for end in range(len(order) + 1):
        for name, numbers in by_layer(order[:end], list(saliencies)).items():
            of_layer = saliencies[name]
            assert numbers == sorted(numbers)
            dropped = set(range(len(of_layer))).difference(numbers)
            assert all(of_layer[one] >= of_layer[other] for one in numbers for other in dropped)


def test_components_are_ordered_by_saliency_per_parameter():
    saliencies = {"wide": [9.0, 1.0], "narrow": [4.0, 3.0]}
    order = order_of_components(saliencies, {"wide": 4, "narrow": 1})
    assert order == [("narrow", 0), ("narrow", 1), ("wide", 0), ("wide", 1)]
    order = order_of_components(saliencies, {"wide": 4, "narrow": 1}, {"wide": 1})
    assert order == [("wide", 0), ("narrow", 0), ("narrow", 1), ("wide", 1)]


def test_ties_go_to_the_layer_that_is_named_first_and_to_the_first_component():
    saliencies = {"second": [1.0, 1.0], "first": [1.0]}
    assert order_of_components(saliencies, {"second": 1, "first": 1}) == [
        ("second", 0),
        ("second", 1),
        ("first", 0),
    ]


def test_layers_without_a_kept_component_are_listed():
    assert by_layer([Component("b", 2), Component("b", 0)], ["a", "b"]) == {"a": [], "b": [0, 2]}


RANKS = st.dictionaries(st.sampled_from("abcd"), st.integers(0, 5))


@SETTINGS
@given(RANKS, RANKS, st.fixed_dictionaries({name: st.integers(1, 9) for name in "abcd"}))
def test_agreement_is_a_symmetric_share(first, second, costs):
    found = agreement(first, second, costs)
    assert 0 <= found <= 1
    assert found == agreement(second, first, costs)
    assert agreement(first, first, costs) == 1
    sets = [
        {(name, number, unit) for name, rank in ranks.items() for number in range(rank) for unit in range(costs[name])}
        for ranks in (first, second)
    ]
    larger = max(map(len, sets))
    assert found == pytest.approx(len(sets[0] & sets[1]) / larger if larger else 1.0)
