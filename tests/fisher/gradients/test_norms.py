"""Squared norms of per-example gradients against autograd, and the memory that they take."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from fim_lora.fisher.gradients.norms import gram_squared_norms, materialized_squared_norms, squared_norms
from helpers.gradient_pairs import LiveBytes, random_pair

FORMS = [gram_squared_norms, materialized_squared_norms, squared_norms]
SHAPES = [
    (1, 1, 3, 5),
    (1, 512, 16, 8),
    (2, 7, 12, 9),
    (3, 128, 20, 30),
    (8, 64, 33, 17),
    (5, 300, 6, 2),
    (8, 512, 8, 8),
]


def per_example_gradients(layer, x, g):
    """Gradients of the weight by `vmap(grad)` of the layer itself, independent of the formulas of fim_lora."""
    layer = layer.double()
    parameters = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(parameters, x, g):
        return (functional_call(layer, parameters, (x,)) * g).sum()

    return vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x.double(), g.double())["weight"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forms_equal_autograd(form, shape):
    x, g = random_pair(*shape)
    truth = per_example_gradients(nn.Linear(shape[2], shape[3]), x, g).square().sum((1, 2))
    torch.testing.assert_close(form(x, g), truth, rtol=1e-12, atol=0)
    torch.testing.assert_close(form(x.float(), g.float()).double(), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bound", [1, 500, 3_000, 20_000])
def test_groups_and_blocks_change_nothing(form, bound):
    x, g = random_pair(5, 37, 12, 9)
    truth = (g.mT @ x).square().sum((1, 2))
    torch.testing.assert_close(form(x, g, bound), truth, rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_strides_change_nothing(form):
    x, g = random_pair(3, 256, 20, 30)
    truth = (g.mT @ x).square().sum((1, 2))
    beside_each_other = torch.cat([x, g], 2)
    for strided_x, strided_g in (
        (x.mT.contiguous().mT, g.transpose(0, 1).contiguous().transpose(0, 1)),
        (beside_each_other[:, :, :20], beside_each_other[:, :, 20:]),
        (x, g.mT.contiguous().mT),
    ):
        torch.testing.assert_close(form(strided_x, strided_g), truth, rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", [gram_squared_norms, materialized_squared_norms])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 400, 30, 50), (2, 1500, 16, 16), (1, 10, 700, 900)])
def test_temporary_memory_is_bounded(form, dtype, shape):
    bound = 400_000
    x, g = random_pair(*shape, dtype=dtype)
    with LiveBytes() as memory:
        norms = form(x, g, bound)
    assert norms.nbytes < memory.peak <= bound + 3 * norms.nbytes


def test_half_precision_inputs_are_computed_in_single_precision():
    x, g = random_pair(3, 40, 12, 9, torch.bfloat16)
    truth = (g.double().mT @ x.double()).square().sum((1, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norms = squared_norms(x, g)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms.double(), truth, rtol=1e-5, atol=0)


def test_no_positions_means_no_gradient():
    assert squared_norms(torch.ones(2, 0, 3), torch.ones(2, 0, 4)).tolist() == [0, 0]


def test_canceling_gradients_stay_exact():
    """Softmax gradients sum to nearly zero over positions that share a large common input."""
    torch.manual_seed(0)
    x = torch.randn(2, 256, 32, dtype=torch.float64) + 5
    g = F.softmax(torch.randn(2, 256, 16, dtype=torch.float64), -1)
    g = g - g.mean(1, keepdim=True)
    truth = (g.mT @ x).square().sum((1, 2))
    for form in (gram_squared_norms, materialized_squared_norms):
        torch.testing.assert_close(form(x.float(), g.float()).double(), truth, rtol=1e-5, atol=0)
