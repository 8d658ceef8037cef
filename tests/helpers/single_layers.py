"""One layer of every type in a small model, and its scores by autograd in float64, one example at a time."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from fim_lora.fisher.layers.registry import target_layer
from helpers.calibration import calibrate_norms

WIDTH, CHANNELS, IDS = 6, 4, 11


class Net(nn.Module):
    """One layer, either after another layer, so that its input needs a gradient, or first."""

    def __init__(self, layer, first=True, calls=1):
        super().__init__()
        torch.manual_seed(0)
        self.before = None if first else nn.Linear(WIDTH, WIDTH)
        self.layer = layer
        self.calls = calls

    def forward(self, x, target):
        x = x if self.before is None else torch.tanh(self.before(x))
        y = self.layer(x)
        for _ in range(self.calls - 1):  # shared weights, with another input
            y = y + self.layer(x.flip(-1))
        return {"loss": (torch.tanh(y) - target[:, None]).square().flatten(1).sum(1).mean()}


def batches_of(make_input, batch_size=3, count=2):
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": make_input(batch_size, generator), "target": torch.rand(batch_size, generator=generator)}
        for _ in range(count)
    ]


def batches_for(layer):
    """Targets have the shape of the output they are subtracted from, without its second dimension."""
    batches = batches_of(INPUTS[type(layer)])
    for batch in batches:
        y = layer(batch["x"])
        batch["target"] = torch.rand(y.shape[0], *y.shape[2:], generator=torch.Generator().manual_seed(2))
    return batches


def per_example_truth(model, batches, names, split):
    """`mean(G_t ∘ G_t)` over the joint entries of all `names`, one example and one backward pass at a time.

    The loss is the mean over examples, so the loss of one example by itself is ℓ_t.
    """
    model = copy.deepcopy(model).double().eval()
    weights = [model.get_parameter(name).requires_grad_() for name in names]
    entries = sum(weight.numel() for weight in weights)
    values = []
    for batch in batches:
        for example in split(batch):
            loss = model(**example)["loss"]
            gradients = torch.autograd.grad(loss, weights)
            values.append(sum(gradient.square().sum() for gradient in gradients) / entries)
    return torch.stack(values)


def by_row(batch):
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    return [{key: value[row : row + 1] for key, value in batch.items()} for row in range(len(batch["x"]))]


def assert_score(score, values, rtol=1e-5):
    assert score.num_examples == len(values)
    assert score.mean == pytest.approx(values.mean().item(), rel=rtol)
    assert score.standard_error == pytest.approx((values.std() / len(values) ** 0.5).item(), rel=100 * rtol)
    assert score.norm == pytest.approx((score.num_entries * values.mean()).sqrt().item(), rel=rtol)


def scores_of(model, batches, name="layer", **options):
    layers = {name: model.get_submodule(name)}
    return calibrate_norms(model, layers, batches, len(batches), show_progress_bar=False, **options)


def floats(*shape):
    return lambda batch_size, generator: torch.randn(batch_size, *shape, generator=generator)


def ids(batch_size, generator):
    return torch.randint(0, IDS, (batch_size, 9), generator=generator)


INPUTS = {
    nn.Linear: floats(5, WIDTH),
    Conv1D: floats(5, WIDTH),
    nn.Embedding: ids,
    Gemma3TextScaledWordEmbedding: ids,
    nn.Conv1d: floats(CHANNELS, 13),
    nn.Conv2d: floats(CHANNELS, 9, 7),
    nn.Conv3d: floats(CHANNELS, 5, 6, 7),
}

LINEAR_LAYERS = {
    "linear": lambda: nn.Linear(WIDTH, 3),
    "conv1d of transformers": lambda: Conv1D(3, WIDTH),
}
EMBEDDINGS = {
    "embedding": lambda: nn.Embedding(IDS, WIDTH),
    "embedding with padding": lambda: nn.Embedding(IDS, WIDTH, padding_idx=3),
    "embedding with a scale": lambda: Gemma3TextScaledWordEmbedding(IDS, WIDTH, 0, embed_scale=2.5),
}
CONVOLUTIONS = {
    "convolution 1d": lambda: nn.Conv1d(CHANNELS, 6, 3),
    "convolution 1d, all at once": lambda: nn.Conv1d(CHANNELS, 6, 3, stride=2, padding=3, dilation=2, groups=2),
    "convolution 2d, 1 x 1": lambda: nn.Conv2d(CHANNELS, 6, 1),
    "convolution 2d, stride, padding": lambda: nn.Conv2d(CHANNELS, 6, (3, 2), stride=(2, 3), padding=(1, 0)),
    "convolution 2d, dilation, groups": lambda: nn.Conv2d(CHANNELS, 6, 3, padding=2, dilation=2, groups=2),
    "convolution 2d, depthwise": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, groups=CHANNELS, bias=False),
    "convolution 2d, same": lambda: nn.Conv2d(CHANNELS, 6, (2, 3), padding="same"),
    "convolution 2d, valid": lambda: nn.Conv2d(CHANNELS, 6, (2, 3), padding="valid"),
    "convolution 2d, circular": lambda: nn.Conv2d(CHANNELS, 6, 3, padding=1, padding_mode="circular"),
    "convolution 2d, reflect, same": lambda: nn.Conv2d(CHANNELS, 6, 2, padding="same", padding_mode="reflect"),
    "convolution 3d": lambda: nn.Conv3d(CHANNELS, 6, (2, 3, 1), stride=(1, 2, 1), padding=1, groups=2),
}
LAYERS = LINEAR_LAYERS | EMBEDDINGS | CONVOLUTIONS


def check_scores_equal_autograd(layer, calls):
    torch.manual_seed(0)
    model = Net(layer(), calls=calls)
    batches = batches_for(model.layer)
    score = scores_of(model, batches)["layer"]
    assert_score(score, per_example_truth(model, batches, ["layer.weight"], by_row))
    weight = target_layer("layer", model.layer).weight_shape
    assert weight.entries == model.layer.weight.numel()


def check_dimensions_of_the_adapter(layer):
    """Compares the cost of one rank and the step of the ranks with those of PEFT's own layer."""
    torch.manual_seed(0)
    base = Net(layer())
    weight = target_layer("layer", base.layer).weight_shape
    rank = 2 * weight.rank_step
    model = get_peft_model(base, LoraConfig(r=rank, target_modules=["layer"]))
    adapter = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    cost = weight.parameters_per_rank or weight.d_in + weight.d_out
    assert sum(parameter.numel() for parameter in adapter) == rank * cost
    assert min(weight.d_out, weight.d_in) >= 1
    if weight.rank_step > 1:
        with pytest.raises(ValueError, match="divisible by groups"):
            get_peft_model(Net(layer()), LoraConfig(r=rank + 1, target_modules=["layer"]))


def by_type(batch):
    return {key: value.double() for key, value in batch.items()}


def under_autocast(dtype):
    def forward_fn(model, batch):
        with torch.autocast("cpu", dtype):
            return model(**batch)

    return forward_fn
