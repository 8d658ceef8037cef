"""Squared entries of per-example gradients against autograd, and the memory that they take."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from fim_lora.fisher.gradients.entries import add_squared_embedding_entries, add_squared_entries
from helpers.gradient_pairs import LiveBytes, random_pair

SHAPES = [
    (1, 1, 3, 5),
    (9, 1, 12, 7),
    (2, 7, 12, 9),
    (3, 128, 20, 30),
    (5, 300, 6, 2),
]


def squares_by_autograd(layer, x, g):
    """`Σ_t G_t ∘ G_t` by `vmap(grad)` of the layer itself, independent of the formulas of fim_lora."""
    layer = layer.double()
    parameters = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(parameters, x, g):
        return (functional_call(layer, parameters, (x,)) * g).sum()

    x = x.double() if x.is_floating_point() else x
    return vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, g.double())["weight"].square().sum(0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("start", [torch.float32, torch.float64])  # of the running sum; float32 data either way
def test_entries_equal_autograd(shape, start):
    x, g = random_pair(*shape)
    truth = squares_by_autograd(nn.Linear(shape[2], shape[3]), x.float(), g.float())
    total = torch.full(truth.shape, 2.0, dtype=start)
    add_squared_entries(total, x.float(), g.float(), factor=3.0)
    assert total.dtype == start
    torch.testing.assert_close(total.double(), 2 + 3 * truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_entries_in_float64(shape):
    x, g = random_pair(*shape)
    total = torch.zeros(shape[3], shape[2], dtype=torch.float64)
    add_squared_entries(total, x, g)
    truth = squares_by_autograd(nn.Linear(shape[2], shape[3]), x, g)
    torch.testing.assert_close(total, truth, rtol=1e-12, atol=1e-12 * truth.max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_half_precision_is_multiplied_in_float32_even_under_autocast(shape, dtype):
    x, g = (tensor.to(dtype) for tensor in random_pair(*shape))
    total = torch.zeros(shape[3], shape[2])
    with torch.autocast("cpu", torch.bfloat16):
        add_squared_entries(total, x, g)
    truth = squares_by_autograd(nn.Linear(shape[2], shape[3]), x, g)
    torch.testing.assert_close(total.double(), truth, rtol=1e-4, atol=1e-5 * truth.max().item())


@pytest.mark.parametrize("bound", [1, 500, 3_000, 20_000])
@pytest.mark.parametrize("positions", [1, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups_and_blocks_change_nothing(bound, positions, dtype):
    x, g = random_pair(5, positions, 12, 9)
    truth = (g.mT @ x).square().sum(0)
    total = torch.zeros(9, 12, dtype=dtype)  # float32 is the sum that is not added to directly
    add_squared_entries(total, x, g, max_temporary_bytes=bound)
    torch.testing.assert_close(total.double(), truth, rtol=1e-6 if dtype == torch.float32 else 1e-11, atol=0)


@pytest.mark.parametrize("shape", [(4, 64, 256, 128), (2000, 1, 256, 128), (2, 4096, 16, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [torch.float32, torch.float64])
def test_temporary_memory_is_bounded(shape, dtype, start):
    x, g = random_pair(*shape, dtype=dtype)
    total = torch.zeros(shape[3], shape[2], dtype=start)
    bound = 64 * 1024
    with LiveBytes() as memory:
        add_squared_entries(total, x, g, max_temporary_bytes=bound)
    assert 0 < memory.peak <= bound  # less than one weight, which takes 128 KiB in the first two shapes


def test_no_positions_and_no_examples_add_nothing():
    total = torch.ones(5, 3)
    add_squared_entries(total, torch.zeros(2, 0, 3), torch.zeros(2, 0, 5))
    add_squared_entries(total, torch.zeros(0, 4, 3), torch.zeros(0, 4, 5))
    add_squared_embedding_entries(total, torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0, 3))
    assert total.eq(1).all()


@pytest.mark.parametrize("bound", [1, 400, 2**26])
@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_entries_of_embeddings_equal_autograd(bound, padding_idx, integers):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 5, (3, 8), generator=generator)  # of 7 ids, so some repeat and some do not occur
    g = torch.randn(3, 8, 4, generator=generator)
    truth = squares_by_autograd(nn.Embedding(7, 4, padding_idx=padding_idx), ids, g)
    assert padding_idx is None or (ids == padding_idx).any()
    for start in (torch.float32, torch.float64):
        total = torch.ones(7, 4, dtype=start)
        add_squared_embedding_entries(total, ids.to(integers), g, 2.0, padding_idx, bound)
        torch.testing.assert_close(total.double(), 1 + 2 * truth, rtol=1e-5, atol=0)


def test_pairs_of_ids_and_examples_exceed_32_bits():
    examples, num_ids = 4096, 2**20
    ids = torch.full((examples, 1), num_ids - 1, dtype=torch.int32)
    total = torch.zeros(num_ids, 1)
    add_squared_embedding_entries(total, ids, torch.ones(examples, 1, 1))
    assert total[-1].item() == examples
    assert total.sum().item() == examples
