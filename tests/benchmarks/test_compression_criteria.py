"""The criteria that `benchmarks/compression.py` compares, and its summary."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.conversion import _find_cutoff_index

from compression_criteria import CRITERIA, OURS, PARA, Adapter, fim_lora
from compression_report import TRAINED_AT_SIZE, format_report, summary
from fim_lora import get_lora_spectrum
from fim_lora.adapter.plain_adapter import plain_adapters
from fim_lora.adapter.truncate import core_map
from fim_lora.spectrum import adapted_layers, checked_layers, path_moments
from helpers.tiny_models import llama, lm_batches

SIZES = (2, 4)


@pytest.fixture(scope="module")
def measured():
    torch.manual_seed(0)
    config = LoraConfig(r=6, lora_alpha=12, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(llama(), config)
    batches = lm_batches()
    layers = checked_layers(model, "default")
    adapted, plain = adapted_layers(model, layers, "default"), plain_adapters(layers, "default")
    moments = path_moments(model, adapted, plain, batches, "default", len(batches), show_progress_bar=False)
    costs = {name: layer.weight_shape.rank_parameters for name, layer in adapted.items()}
    spectrum = get_lora_spectrum(model, batches, num_batches=len(batches), show_progress_bar=False)
    return model, layers, Adapter(plain, moments, costs), spectrum


def products(bases, kept):
    maps = {name: core_map(basis.left, basis.right, kept[name]) for name, basis in bases.items()}
    return {name: (mapped.columns @ mapped.rows)[0] for name, mapped in maps.items()}


@pytest.mark.parametrize("size", SIZES)
def test_ours_is_what_the_library_keeps(measured, size):
    _, _, adapter, spectrum = measured
    selection = CRITERIA[OURS](adapter)
    budget = adapter.num_parameters // size
    of_benchmark = products(selection.bases, selection.keep(budget))
    kept = spectrum.keep(budget)
    for name, layer in spectrum.items():
        mapped = core_map(layer.left, layer.right, kept[name])
        torch.testing.assert_close((mapped.columns @ mapped.rows)[0], of_benchmark[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_no_criterion_exceeds_the_budget(measured, criterion, size):
    _, _, adapter, _ = measured
    kept = CRITERIA[criterion](adapter).keep(adapter.num_parameters // size)
    used = sum(len(numbers) * adapter.costs[name] for name, numbers in kept.items())
    assert 0 < used <= adapter.num_parameters // size


@pytest.mark.parametrize("cap", [2, 3])
def test_a_largest_rank_is_that_of_the_library(measured, cap):
    _, _, adapter, spectrum = measured
    budget = adapter.num_parameters // 4
    kept = fim_lora(adapter, cap=cap).keep(budget)
    assert {name: len(numbers) for name, numbers in kept.items()} == spectrum.ranks_of(
        spectrum.keep(budget, r_max=6 // cap)
    )
    assert max(map(len, kept.values())) == 6 // cap


def dense_singular_values(layer):
    return torch.linalg.svdvals(layer.get_delta_weight("default").double()).detach()


def test_para_is_one_threshold_on_the_singular_values_of_the_update(measured):
    _, layers, adapter, _ = measured
    kept = CRITERIA[PARA](adapter).keep(adapter.num_parameters // 2)
    values = {name: dense_singular_values(layer)[:6] for name, layer in layers.items()}
    smallest_kept = min(float(values[name][len(numbers) - 1]) for name, numbers in kept.items() if numbers)
    largest_dropped = max(float(values[name][len(numbers)]) for name, numbers in kept.items() if len(numbers) < 6)
    # Where layers have different costs, a cheaper component may still fit after the threshold.
    assert largest_dropped <= smallest_kept * 1.2


def test_energy_is_the_rule_of_peft(measured):
    _, layers, adapter, _ = measured
    selection = CRITERIA["energy per layer"](adapter)
    kept = selection.keep(adapter.num_parameters // 2)
    shares = np.linspace(0.3, 0.999, 2000)
    ranks = {name: len(numbers) for name, numbers in kept.items()}
    values = {name: dense_singular_values(layer) for name, layer in layers.items()}
    found = [{name: int(_find_cutoff_index(one, share)) for name, one in values.items()} for share in shares]
    assert ranks in found


def result_of(seed, increases, whole=1.0):
    """Losses of two batches of one term each, in which every criterion adds the same increase to both."""
    criteria = {
        name: {"seconds": 0.0, "sizes": {str(size): {"losses": [[whole + one, 1]] * 2} for size in SIZES}}
        for name, one in increases.items()
    }
    run = {"task": "task", "r": 4, "learning_rate": 0.1, "seed": seed}
    return {"run": run, "whole": [[whole, 1], [whole, 1]], "criteria": criteria}


def test_the_summary_reports_the_ratio_of_the_increases():
    results = [result_of(0, {OURS: 0.1, PARA: 0.2}), result_of(1, {OURS: 0.2, PARA: 0.4})]
    found = summary(results, SIZES, OURS, PARA)
    assert found["increase_over_para"]["2"]["mean"] == pytest.approx(0.5)
    assert found["increase_over_para"]["2"]["ci95"] == pytest.approx([0.5, 0.5])
    assert found["tasks"]["task"]["increases"][PARA]["4"]["mean"] == pytest.approx(0.3)
    assert "0.50 [0.50, 0.50]" in format_report(found)


def test_a_reference_within_its_noise_has_no_ratio():
    found = summary([result_of(0, {OURS: 0.1, PARA: -0.01})], SIZES, OURS, PARA)
    assert found["increase_over_para"] == {}
    assert "within noise" in format_report(found)


@pytest.mark.parametrize(("increase", "size"), [(0.2, "1"), (0.009, "1/4"), (-0.1, "1/4")])
def test_the_smallest_size_within_a_limit(increase, size):
    found = summary([result_of(0, {OURS: increase, PARA: 0.2})], SIZES, OURS, PARA)
    (row,) = found["tasks"]["task"]["adapters"]
    assert (row["ours_within"], row["reference_within"]) == (size, "1")
    assert f"| {size} / 1 |" in format_report(found)


def test_a_criterion_is_compared_over_the_adapters_that_have_it():
    results = [result_of(0, {OURS: 0.1, PARA: 0.2, "other": 0.3}), result_of(1, {OURS: 0.1, PARA: 0.6})]
    increases = summary(results, SIZES, OURS, PARA)["tasks"]["task"]["increases"]
    for name, expected in (("other", (1, 0.3, 0.2)), (OURS, (2, 0.1, 0.4))):
        found = increases[name]["2"]
        assert (found["adapters"], found["mean"], found["reference"]) == pytest.approx(expected)


def test_sizes_at_which_ours_is_above_the_reference_are_listed():
    results = [result_of(0, {OURS: 0.3, PARA: 0.2}), result_of(1, {OURS: 0.1, PARA: 0.2})]
    found = summary(results, SIZES, OURS, PARA)["above_para"]
    assert [(one["seed"], one["size"]) for one in found] == [(0, 2), (0, 4)]
    assert found[0]["mean"] == pytest.approx(0.1)
    assert found[0]["ci95"] == pytest.approx([0.1, 0.1])


def test_adapters_trained_at_the_size_have_a_table_of_their_own():
    trained, without = {OURS: 0.1, PARA: 0.2, TRAINED_AT_SIZE: 0.05}, {OURS: 0.1, PARA: 0.2}
    found = summary([result_of(0, trained), result_of(1, without)], SIZES, OURS, PARA)
    assert TRAINED_AT_SIZE not in found["tasks"]["task"]["increases"]
    table = format_report(found).partition("### Trained at the smaller size")[2].partition("###")[0]
    assert "| task | r = 4, rate 0.1, seed 0 | +0.0500 / +0.1000 | +0.0500 / +0.1000 |" in table
    assert "seed 1" not in table
