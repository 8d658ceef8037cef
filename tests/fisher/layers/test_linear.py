"""The eFIM of linear layers against per-example gradients by autograd in float64."""

import copy

import pytest
import torch
from torch import nn

from helpers.calibration import assert_scores, scores_of
from helpers.single_layers import LINEAR_LAYERS, check_dimensions_of_the_adapter, check_scores_equal_autograd


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("layer", LINEAR_LAYERS.values(), ids=LINEAR_LAYERS)
def test_scores_equal_autograd(layer, calls):
    check_scores_equal_autograd(layer, calls)


@pytest.mark.parametrize("layer", LINEAR_LAYERS.values(), ids=LINEAR_LAYERS)
def test_dimensions_are_those_of_the_adapter_that_peft_makes(layer):
    check_dimensions_of_the_adapter(layer)


def test_a_linear_layer_equals_vmap_of_grad():
    """Per-example gradients by `torch.func`, with a loss reduction that varies from batch to batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    batches = [(torch.randn(size, 7, 6), torch.randn(size, 7, 3), terms) for size, terms in ((1, 3), (4, 11), (8, 40))]

    def forward_fn(model, batch):
        x, y, terms = batch
        return (model(x) - y).square().sum() / terms

    scores = scores_of(model, batches, ["0", "2"], forward_fn=forward_fn)

    double = copy.deepcopy(model).double()
    parameters = {name: value.detach() for name, value in double.named_parameters()}

    def loss(parameters, x, y, factor):
        return (torch.func.functional_call(double, parameters, (x,)) - y).square().sum() * factor

    values = {"0": [], "2": []}
    for x, y, terms in batches:
        factor = len(x) / terms
        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, None))(
            parameters, x.double(), y.double(), factor
        )
        for name in values:
            values[name].append(gradients[f"{name}.weight"].square().mean((1, 2)))
    assert_scores(scores, {name: torch.cat(value) for name, value in values.items()})
