"""eFIM diagonals by autograd in float64, one example and one backward pass at a time."""

import copy

import torch

from helpers.tiny_models import number_of_terms, sum_of_losses


def diagonals_of_examples(model, examples, names):
    """`mean(G_t ∘ G_t)` of the weights of some layers, over batches that have a single example each."""
    losses = (lambda model, one=one: model(**one)["loss"] for one in examples)
    return mean_of_squares(model, losses, names)


def diagonals_of_batches(model, batches, names):
    """`mean(G_t ∘ G_t)` for models whose loss is a mean over the tokens or the labels of a batch."""

    def losses():
        for batch in batches:
            size, terms = len(batch["input_ids"]), number_of_terms(model, batch)
            for row in range(size):
                share = slice(row, row + 1), size / terms
                yield lambda model, batch=batch, share=share: sum_of_losses(model, batch, share[0]) * share[1]

    return mean_of_squares(model, losses(), names)


def mean_of_squares(model, losses, names):
    model = copy.deepcopy(model).double().eval()
    weights = [model.get_submodule(name).weight.requires_grad_() for name in names]
    sums, count = [torch.zeros_like(weight) for weight in weights], 0
    for loss in losses:
        gradients = torch.autograd.grad(loss(model), weights)
        sums = [total + gradient.square() for total, gradient in zip(sums, gradients, strict=True)]
        count += 1
    return {name: total / count for name, total in zip(names, sums, strict=True)}


def assert_diagonals(found, expected, rtol=1e-4, atol=1e-6):
    """Compares every element; `atol` is relative to the largest element of the layer."""
    assert set(found) == set(expected)
    for name, truth in expected.items():
        assert found[name].shape == truth.shape, name
        bound = atol * truth.max().item()
        torch.testing.assert_close(found[name].double(), truth, rtol=rtol, atol=bound)
