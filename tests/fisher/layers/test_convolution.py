"""The eFIM of convolutions against per-example gradients by autograd in float64."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from fim_lora.fisher.layers.call import LayerCall
from fim_lora.fisher.layers.components import adapted_layer
from fim_lora.fisher.layers.convolution import (
    add_convolution_entries,
    measure_convolution,
    measure_convolution_components,
)
from fim_lora.fisher.layers.registry import target_layer
from helpers.calibration import calibrate_norms
from helpers.own_warnings import UNATTRIBUTED
from helpers.single_layers import (
    CHANNELS,
    CONVOLUTIONS,
    Net,
    assert_score,
    batches_for,
    batches_of,
    by_row,
    check_dimensions_of_the_adapter,
    check_scores_equal_autograd,
    floats,
    per_example_truth,
    scores_of,
)


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("layer", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_scores_equal_autograd(layer, calls):
    check_scores_equal_autograd(layer, calls)


@pytest.mark.parametrize("layer", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_dimensions_are_those_of_the_adapter_that_peft_makes(layer):
    check_dimensions_of_the_adapter(layer)


@pytest.mark.parametrize("layer", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_weight_that_is_empty_when_the_gradient_arrives(layer):
    """As of ZeRO-3, which gathers a weight only while its layer runs."""
    torch.manual_seed(0)
    target = target_layer("layer", layer())
    (batch, _) = batches_for(target.module)
    x, weight = batch["x"], target.module.weight
    y = target.module(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), y, retain_graph=True)
    truth = torch.stack([torch.autograd.grad(row.square().sum(), weight, retain_graph=True)[0] for row in y])
    weight.data = torch.empty(0)
    calls = [LayerCall((x,), {}, (), None, (gradient,))]
    norms = measure_convolution(target, calls, len(x))
    torch.testing.assert_close(norms, truth.square().flatten(1).sum(1), rtol=1e-4, atol=1e-4)
    entries = torch.zeros(truth.shape[1:])
    add_convolution_entries(entries, target, calls, len(x), 1.0)
    torch.testing.assert_close(entries, truth.square().sum(0), rtol=1e-4, atol=1e-4)


def test_a_weight_a_that_is_empty_when_the_gradient_arrives():
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Conv2d(CHANNELS, 6, 3, groups=2)), LoraConfig(r=4, target_modules=["0"]))
    target = adapted_layer("0", model.base_model.model[0], "default")
    h, u = torch.randn(2, 3, 4, 5, 5)
    target.module.weight.data = torch.empty(0)
    moments = measure_convolution_components(target, [LayerCall((h,), {}, (), None, (u,))], len(h))
    # Each of the two groups has half of the four components.
    by_group = torch.stack([u.unflatten(1, (2, 2)), h.unflatten(1, (2, 2))])
    truth = torch.einsum("ngrxy,ngsxy->ngrs", *by_group)
    torch.testing.assert_close(moments.core_gradients, truth, rtol=1e-4, atol=1e-4)


class Frames(Net):
    """Several images of an example as rows of the batch, as vision models do with video and tiles."""

    def forward(self, x, target):
        y = self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return {"loss": (torch.tanh(y) - target[:, None, None, None, None]).square().flatten(1).sum(1).mean()}


def test_images_of_one_example_belong_together():
    # As many channels as examples: the second dimension of an image is not a batch dimension.
    torch.manual_seed(0)
    model = Frames(nn.Conv2d(CHANNELS, 6, 3))
    batches = batches_of(floats(2, CHANNELS, 5, 5), batch_size=CHANNELS)

    def forward_fn(model, batch):
        return model(**batch)

    score = scores_of(model, batches, forward_fn=forward_fn)["layer"]
    assert_score(score, per_example_truth(model, batches, ["layer.weight"], by_row))


@UNATTRIBUTED
def test_one_image_without_a_batch():
    torch.manual_seed(0)
    layer = nn.Conv2d(CHANNELS, 6, 3)
    x = torch.randn(CHANNELS, 5, 5)
    layers = {"layer": layer}
    scores = calibrate_norms(layer, layers, [x], 1, lambda model, x: model(x).square().sum(), show_progress_bar=False)
    weight = layer.weight.detach().double().requires_grad_()
    loss = F.conv2d(x.double(), weight, layer.bias.detach().double()).square().sum()
    (truth,) = torch.autograd.grad(loss, weight)
    # The loop infers a wrong batch size from the input here, and wrongly treats the loss as a mean.
    assert scores["layer"].mean == pytest.approx(truth.square().mean().item() * CHANNELS, rel=1e-5)
