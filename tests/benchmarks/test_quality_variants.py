"""The variants: batch gradients and greedy ranks."""

import itertools
import random

import pytest
import torch

import quality_variants
from helpers import tiny_models
from helpers.benchmark_runs import CALIBRATION_BATCHES, tiny_setting


def test_batch_gradients_are_those_of_autograd():
    setting = tiny_setting()
    names = ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"]
    model = tiny_models.bert().eval()
    for batch, gradients in zip(CALIBRATION_BATCHES, quality_variants.batch_gradients(setting, names), strict=True):
        weights = [model.get_submodule(name).weight for name in names]
        for name, expected in zip(names, torch.autograd.grad(model(**batch).loss, weights), strict=True):
            torch.testing.assert_close(gradients[name], expected)


def test_greedy_ranks_are_the_best_ones_where_all_ranks_cost_the_same():
    draw = random.Random(0)
    for _ in range(20):
        gains = {name: sorted((draw.random() for _ in range(4)), reverse=True) for name in "abc"}
        limit = 3 * draw.randint(3, 12)
        ranks = quality_variants.greedy_ranks(gains, dict.fromkeys("abc", 3), limit)
        possible = [c for c in itertools.product(range(1, 5), repeat=3) if 3 * sum(c) <= limit]
        best = max(sum(sum(gains[n][:k]) for n, k in zip("abc", c, strict=True)) for c in possible)
        assert sum(sum(gains[name][:rank]) for name, rank in ranks.items()) == pytest.approx(best)
