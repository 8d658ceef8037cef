"""The eFIM of convolutions against per-example gradients by autograd in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.calibration import calibrate_norms
from helpers.own_warnings import UNATTRIBUTED
from helpers.single_layers import (
    CHANNELS,
    CONVOLUTIONS,
    Net,
    assert_score,
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
