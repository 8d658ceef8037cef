"""The eFIM of whole models against per-example gradients by autograd in float64."""

import warnings

import pytest
import torch

from helpers.calibration import assert_scores, scores_of
from helpers.tiny_models import (
    bert,
    class_batch,
    gpt2,
    llama,
    lm_batches,
    names_of,
    per_example_scores,
    t5,
    token_batch,
)

ARCHITECTURES = {
    "llama": (llama, ("q_proj", "k_proj", "o_proj", "down_proj", "lm_head")),
    "gpt2": (gpt2, ("c_attn", "c_proj", "c_fc")),
    "bert": (bert, ("query", "value", "dense", "classifier")),
    "t5": (t5, ("q", "o", "wi", "wo")),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_scores_equal_autograd(architecture, padding):
    make, ends = ARCHITECTURES[architecture]
    model = make()
    batches = lm_batches(padding=padding) if architecture != "bert" else [class_batch(seed=seed) for seed in range(3)]
    names = names_of(model, *ends)
    scores = scores_of(model, batches, names)
    truth = per_example_scores(make(), batches, names)
    assert_scores(scores, truth)
    assert (
        scores[names[0]].shape == {"llama": (24, 24), "gpt2": (72, 24), "bert": (24, 24), "t5": (24, 24)}[architecture]
    )


@pytest.mark.parametrize(("batch_size", "length"), [(1, 2), (1, 512), (8, 17), (5, 3), (2, 200)])
def test_scores_for_batch_sizes_and_lengths(batch_size, length):
    batches = [token_batch(batch_size, length, seed=1, shortest=2)]
    names = names_of(llama(), "v_proj", "gate_proj")
    assert_scores(scores_of(llama(), batches, names, exact=True), per_example_scores(llama(), batches, names))


def test_half_precision_model_and_autocast():
    batches, names = lm_batches(), names_of(llama(), "q_proj", "down_proj")
    exact = scores_of(llama(), batches, names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        half = scores_of(llama().bfloat16(), batches, names)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = scores_of(llama(), batches, names)
    for name in names:
        # The noise of a forward and backward pass in bfloat16.
        assert half[name].mean == pytest.approx(exact[name].mean, rel=0.1)
        assert mixed[name].mean == pytest.approx(exact[name].mean, rel=0.1)
