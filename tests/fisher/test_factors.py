"""The moments of the components of trained adapters against autograd in float64, for every type of layer."""

import pickle
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from helpers.attention import Attention, attention_batches
from helpers.expert_models import EXPERTS as STACKED
from helpers.expert_models import qwen3_moe
from helpers.mixtures import TARGETS as EXPERTS
from helpers.mixtures import Mixture
from helpers.single_layers import CHANNELS, LAYERS, WIDTH, Net, batches_for, batches_of, floats
from helpers.tiny_models import bert, class_batch, gpt2, llama, lm_batches, number_of_terms, t5, token_batch
from helpers.trained_adapters import (
    a_of,
    b_of,
    core_gradients_of,
    in_float64,
    keep_call,
    lora_layers_of,
    losses_of_rows,
    losses_of_tokens,
    measured,
    trained,
)


def assert_moments(moments, truth, rtol=1e-5, atol=1e-6):
    """`atol` is relative to the largest gradient of the layer."""
    assert set(moments.shapes) == set(truth)
    for name, expected in truth.items():
        found = np.concatenate(moments.of(name).core_gradients)
        bound = atol * float(expected.abs().max())
        assert bound > 0
        np.testing.assert_allclose(found, in_order(moments, expected), rtol=rtol, atol=bound, err_msg=name)


def in_order(moments, by_example):
    """The examples of all batches, those of the first, third, … batch before the others."""
    sizes = moments.batch_sizes
    numbers = [size for pair in zip(sizes[0], [*sizes[1], 0], strict=False) for size in pair]
    parts = by_example.split(numbers)
    return torch.cat([*parts[::2], *parts[1::2]]).numpy()


def truth_of(model, batches):
    double = in_float64(model)
    return core_gradients_of(double, lora_layers_of(double), losses_of_rows(batches))


def convolution_1d():
    return nn.Conv1d(CHANNELS, 6, 3, stride=2, padding=3, groups=2)


# The A of PEFT has no dilation, so an adapter of a dilated convolution fails in the forward pass.
NO_DILATION = (1, (1,), (1, 1), (1, 1, 1))
WITH_ADAPTER = {name: layer for name, layer in LAYERS.items() if getattr(layer(), "dilation", 1) in NO_DILATION}
WITH_ADAPTER["convolution 1d, groups"] = convolution_1d


@pytest.mark.parametrize("layer", WITH_ADAPTER.values(), ids=WITH_ADAPTER)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_core_gradients_of_every_layer_type(layer, use_rslora):
    torch.manual_seed(0)
    base = Net(layer())
    batches = batches_for(base.layer)
    step = getattr(base.layer, "groups", 1)
    model = trained(base, target_modules=["layer"], r=2 * step, use_rslora=use_rslora)
    assert_moments(measured(model, batches), truth_of(model, batches))


def test_a_layer_that_is_called_twice_and_follows_another_one():
    base = Net(nn.Linear(WIDTH, 3), first=False, calls=2)
    batches = batches_for(base.layer)
    model = trained(base, target_modules=["layer", "before"])
    assert_moments(measured(model, batches), truth_of(model, batches))


@pytest.mark.parametrize(
    "options",
    [{}, {"batch_first": True}, {"first": False, "batch_first": True, "bias": False}, {"memory": True}],
    ids=str,
)
def test_attention(options):
    base = Attention(**options)
    batches = attention_batches("memory" in options)
    model = trained(base, target_modules=["attention"], r=3)
    assert_moments(measured(model, batches), truth_of(model, batches))


@pytest.mark.parametrize("parameters", [EXPERTS, EXPERTS[:1], EXPERTS[::-1]], ids=str)
def test_experts(parameters):
    model = trained(Mixture(), target_modules=["first"], target_parameters=parameters, r=2)
    batches = batches_of(floats(5, WIDTH), count=2)
    assert_moments(measured(model, batches), truth_of(model, batches))


# --- Whole models, with losses that are means over labels ---


def second_moments_of(model, layers, batches):
    """`Σ h hᵀ` and `Σ u uᵀ` of linear layers over all positions, from their inputs and output gradients in float64."""
    sums = {name: [0.0, 0.0] for name in layers}
    for loss in losses_of_tokens(model, batches):
        seen, handles = {name: [] for name in layers}, []
        for name, layer in layers.items():
            handles.append(layer.register_forward_hook(partial(keep_call, seen[name])))
        loss(model).backward()
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            for x, y in seen[name]:
                h = (x @ a_of(layer).T).flatten(0, -2)
                u = (layer.scaling["default"] * y.grad @ b_of(layer)).flatten(0, -2)
                sums[name][0] += (h.T @ h).detach()
                sums[name][1] += (u.T @ u).detach()
    return sums


ARCHITECTURES = {
    "llama": (llama, ("q_proj", "o_proj", "down_proj", "lm_head")),
    "gpt2": (gpt2, ("c_attn", "c_proj")),
    "bert": (bert, ("query", "classifier")),
    "t5": (t5, ("q", "wi", "wo")),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_whole_models(architecture):
    make, targets = ARCHITECTURES[architecture]
    batches = [class_batch(seed=seed) for seed in range(2)] if architecture == "bert" else lm_batches(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about Conv1D
        model = trained(make(), target_modules=targets)
    moments = measured(model, batches)
    double = in_float64(model)
    layers = lora_layers_of(double)
    assert_moments(moments, core_gradients_of(double, layers, losses_of_tokens(double, batches)), rtol=1e-4)
    for name, truth in second_moments_of(double, layers, batches).items():
        for found, expected in zip((moments.of(name).inputs, moments.of(name).gradients), truth, strict=True):
            np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    assert moments.num_examples == 8
    assert moments.terms_per_example == sum(number_of_terms(make(), batch) for batch in batches) / 8


def test_experts_of_transformers():
    batches = lm_batches(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about a name that two layers have
        model = trained(qwen3_moe(), target_modules=["q_proj"], target_parameters=STACKED, r=2)
    moments = measured(model, batches)
    double = in_float64(model)
    double.get_base_model().set_experts_implementation("eager")  # the other implementations do not support float64
    truth = core_gradients_of(double, lora_layers_of(double), losses_of_tokens(double, batches))
    assert len(truth) == 2 + 4
    assert_moments(moments, truth, rtol=1e-4, atol=1e-5)


def test_moments_without_positions_are_those_of_the_core_gradients():
    """Of the summed loss, so that batches of unequal sizes have their weights."""
    batches = [attention_batches(batch_size=size)[0] for size in (2, 5)]
    model = trained(Attention(), target_modules=["attention"], r=3)
    moments = measured(model, batches).of("attention")
    core = truth_of(model, batches)["attention"]
    np.testing.assert_allclose(moments.inputs, torch.einsum("bpij,bpik->pjk", core, core), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(moments.gradients, torch.einsum("bpij,bpkj->pik", core, core), rtol=1e-4, atol=1e-6)


# --- The rules of the statistic ---


class Routed(nn.Module):
    """A layer that gets the rows of all examples but one, so that no rule attributes them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, target):
        y = self.other(x)
        rows = torch.tanh(self.layer(y.flatten(0, 1)[:-1]))
        y = y + torch.cat([rows, rows.new_zeros(1, WIDTH)]).view_as(y)
        return {"loss": (y - target[:, None, None]).square().flatten(1).sum(1).mean()}


def test_rows_that_belong_to_no_example_count_as_one():
    batches = batches_of(floats(5, WIDTH), count=2)
    model = trained(Routed(), target_modules=["layer", "other"])
    with pytest.warns(UserWarning, match=r"could not be attributed to examples.*\['layer'\]"):
        moments = measured(model, batches)
    double = in_float64(model)
    double_batches = [{key: value.double() for key, value in batch.items()} for batch in batches]
    losses = [lambda model, batch=batch: model(**batch)["loss"] * 3 for batch in double_batches]
    truth = core_gradients_of(double, lora_layers_of(double), losses)["layer"]
    for half, expected in enumerate(truth):
        (found,) = moments.of("layer", half).core_gradients
        np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-5)
        assert not found[1:].any()
        # The other layer has its examples.
        assert all(one.any() for one in moments.of("other", half).core_gradients[0])


@pytest.mark.parametrize("place", range(3))
def test_a_batch_that_is_not_finite_is_left_out(place):
    batches = lm_batches(3)
    model = trained(llama())
    expected = measured(model, [batch for index, batch in enumerate(batches) if index != place])

    def overflowing(model, batch):
        loss = model(**batch).loss
        return loss * float("inf") if batch is not None and torch.equal(batch["input_ids"], bad) else loss

    bad = batches[place]["input_ids"]
    with pytest.warns(UserWarning, match="1 of 3 calibration batches had a loss or gradients that are not finite"):
        moments = measured(model, batches, forward_fn=overflowing)
    assert (moments.num_batches, moments.num_skipped_batches, moments.num_examples) == (3, 1, 8)
    for name in expected.shapes:
        np.testing.assert_allclose(moments.of(name).inputs, expected.of(name).inputs)
        np.testing.assert_allclose(moments.of(name).gradients, expected.of(name).gradients)
        found, truth = (np.concatenate(one.of(name).core_gradients) for one in (moments, expected))
        np.testing.assert_allclose(np.sort(found, 0), np.sort(truth, 0))
    with pytest.raises(RuntimeError, match="All 3 calibration batches had a loss or gradients that are not finite"):
        measured(model, batches, forward_fn=lambda model, batch: model(**batch).loss * float("nan"))


def test_a_loss_without_labels_leaves_the_batch_out():
    """PyTorch's mean over no labels is NaN, with gradients of zero."""
    batches = lm_batches(2)
    empty = batches[1] | {"labels": torch.full_like(batches[1]["labels"], -100)}
    model = trained(llama())
    with pytest.warns(UserWarning, match="1 of 2 calibration batches"):
        moments = measured(model, [batches[0], empty])
    expected = measured(model, batches[:1])
    assert moments.terms_per_example == expected.terms_per_example
    for name in expected.shapes:
        np.testing.assert_array_equal(moments.of(name).inputs, expected.of(name).inputs)


def test_an_untrained_adapter_is_an_error():
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(RuntimeError, match="the adapter is untrained"):
        measured(model, lm_batches(1))


def test_layers_that_no_loss_depends_on_are_named():
    class Unused(Net):
        def __init__(self):
            super().__init__(nn.Linear(WIDTH, 3))
            self.unused = nn.Linear(WIDTH, 3)

    base = Unused()
    batches = batches_for(base.layer)
    model = trained(base, target_modules=["layer", "unused"])
    with pytest.warns(UserWarning, match=r"1 layers took no part in the loss .*\['unused'\]"):
        moments = measured(model, batches)
    assert not np.concatenate(moments.of("unused").core_gradients).any()
    assert np.concatenate(moments.of("unused").core_gradients).shape[0] == moments.num_examples


def test_two_statistics_merge_to_that_of_all_batches():
    """As those of two processes. Batches of unequal sizes."""
    batches = [token_batch(3, 10, seed=0), token_batch(4, 8, seed=1), token_batch(2, 12, seed=2)]
    model = trained(llama())
    whole = measured(model, batches)
    parts = [measured(model, batches[:2]), measured(model, batches[2:])]
    merged = pickle.loads(pickle.dumps(parts[0])).merge(parts[1:])
    assert (merged.num_batches, merged.num_examples) == (3, 9)
    assert merged.num_loss_terms == whole.num_loss_terms
    assert merged.batch_sizes == whole.batch_sizes == ([3, 2], [4])
    for name in whole.shapes:
        for half in (None, 0, 1):
            np.testing.assert_allclose(merged.of(name, half).inputs, whole.of(name, half).inputs)
            np.testing.assert_allclose(merged.of(name, half).gradients, whole.of(name, half).gradients)
            found, expected = (np.concatenate(one.of(name, half).core_gradients) for one in (merged, whole))
            np.testing.assert_array_equal(found, expected)
