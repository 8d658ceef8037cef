"""The shapes with random weights, and the physical limit of their cost."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import cost_shapes
from helpers import tiny_models


def test_the_physical_limit_counts_what_torch_counts():
    model = tiny_models.llama(attn_implementation="eager")
    ids = torch.randint(1, tiny_models.VOCABULARY, (2, 30))
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=ids)
    operations = counter.get_flop_counts()["Global"]
    attention = operations[torch.ops.aten.bmm]
    weights = sum(operations.values()) - attention
    # Weights: as many operations backward as forward. Causal attention: half of three times the forward operations.
    assert cost_shapes.pass_operations(model, 2, 30) == pytest.approx(2 * weights + 1.5 * attention, rel=0.01)


def test_an_unknown_shape_is_named_together_with_those_there_are():
    with pytest.raises(ValueError, match=r"Unknown shape 'gpt-5'.*smollm2-135m"):
        cost_shapes.random_model("gpt-5", torch.device("cpu"))
