"""The methods that ask how many ranks a layer needs: spreads of gradients, and ranks that a short training keeps."""

import pytest
import torch

import quality_needs
from helpers import tiny_models
from helpers.benchmark_runs import tiny_setting
from quality_methods import fim_scores

LAYERS = ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"]


def test_spread_counts_equal_directions():
    directions = torch.linalg.qr(torch.randn(16, 5, generator=torch.Generator().manual_seed(0))).Q
    assert quality_needs.spread(3 * directions @ directions.T) == pytest.approx(5, rel=1e-5)
    assert quality_needs.spread(torch.zeros(16, 16)) == 0


def test_the_trace_of_a_sketched_moment_estimates_the_squared_norms():
    setting = tiny_setting()
    scores = fim_scores(setting)
    expected = {name: score.mean * score.num_entries * score.num_examples for name, score in scores.items()}
    moments = quality_needs.sketched_moments(setting, LAYERS)
    for name in LAYERS:
        # Each entry of P and Q has the variance 1, so k² entries of a sketch have the expectation k² ‖G_t‖².
        estimate = float(moments[name].trace()) / quality_needs.SKETCH_SIZE**2
        assert 0.5 < estimate / expected[name] < 2


def test_a_probe_changes_nothing_and_has_the_size_of_uniform_lora():
    setting = tiny_setting()
    before = {name: tensor.clone() for name, tensor in setting.model.state_dict().items()}
    ranks = quality_needs.probed_ranks(setting)
    costs = fim_scores(setting).parameters_per_rank
    assert ranks.keys() == costs.keys()
    assert len(set(ranks.values())) > 1
    size, uniform = (sum(costs[name] * rank for name, rank in r.items()) for r in (ranks, dict.fromkeys(costs, 2)))
    assert 0.9 * uniform < size <= uniform
    after = setting.model.state_dict()
    assert after.keys() == before.keys() == tiny_models.bert().state_dict().keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_ranks_are_lowered_from_the_largest_until_they_fit():
    scores = fim_scores(tiny_setting())
    wide = dict.fromkeys(scores, 0) | {LAYERS[0]: 40}
    fitted = quality_needs.within(wide, scores, 2)
    costs = scores.parameters_per_rank
    size = sum(costs[name] * rank for name, rank in fitted.items())
    assert 2 * sum(costs.values()) - costs[LAYERS[0]] < size <= 2 * sum(costs.values())
    assert {rank for name, rank in fitted.items() if name != LAYERS[0]} == {1}
