"""Which layers have a layer type, and which are refused."""

import pytest
from torch import nn

from fim_lora.fisher.layers.registry import target_layer
from helpers.calibration import scores_of
from helpers.tiny_models import llama, lm_batches


class Special(nn.Linear):
    pass


def test_subclasses_are_found_and_others_named():
    linear, special = target_layer("a", nn.Linear(2, 3)), target_layer("a", Special(2, 3))
    assert special.layer_type == linear.layer_type
    with pytest.raises(TypeError, match=r"'a\.b' is a .*LayerNorm.*exclude_modules"):
        target_layer("a.b", nn.LayerNorm(2))


def test_a_layer_of_which_only_a_part_is_here_is_refused():
    model = llama()
    mlp = model.model.layers[1].mlp
    # As tensor parallelism leaves it: the attributes of the layer still hold the whole size.
    for layer in (mlp.gate_proj, mlp.up_proj):
        layer.weight = nn.Parameter(layer.weight[:20].detach())
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, :20].detach())
    for name in ("up_proj", "down_proj"):
        with pytest.raises(ValueError, match=rf"layers\.1\.mlp\.{name}' is .*Tensor parallelism is not supported"):
            scores_of(model, lm_batches(), [f"model.layers.1.mlp.{name}"])
