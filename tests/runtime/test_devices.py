"""Layers on several devices."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fim_lora import get_lora_spectrum, initialize_lora_fim_ranks
from fim_lora.adapter import truncate
from fim_lora.adapter.truncate import core_map
from helpers.adapters import fim_model, lora_layers
from helpers.calibration import calibrate_norms
from helpers.every_layer_type import batches, every_type
from helpers.llama_calibration import assert_scores
from helpers.trained_adapters import lora_layers_of, spectrum_of

HOST, SECOND = torch.device("cpu"), torch.device("cpu:1")


class OnSecondDevice(torch.Tensor):
    """A tensor on a device that does not exist. Its values are those of a tensor on the CPU."""

    @staticmethod
    def __new__(cls, value):
        return torch.Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), dtype=value.dtype, device=SECOND
        )

    def __init__(self, value):
        self.value = value

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return on_one_device(function, args, kwargs or {})


class TwoDevices(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return on_one_device(function, args, kwargs or {})


def on_one_device(function, args, kwargs):
    """The rules of PyTorch for GPUs: only copies go from device to device, and numbers may come from the host.

    The second device has neither float64 nor decompositions, like Apple's GPUs.
    """
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    devices = {tensor.device for tensor in tensors if tensor.ndim or tensor.device != HOST}
    copies = function is torch.ops.aten.copy_.default
    if len(devices) > 1 and not copies:
        raise RuntimeError(f"{function} of tensors on {devices}")
    device = kwargs.get("device") or (tensors[0].device if copies else next(iter(devices), HOST))

    def inside(value):
        if isinstance(value, OnSecondDevice):
            return value.value
        return HOST if value == SECOND else value

    result = function(*tree_map(inside, args), **tree_map(inside, kwargs))
    wide = any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(result))
    if device == SECOND and (wide or "linalg_qr" in function._schema.name):
        raise TypeError(f"{function} in float64, or a decomposition, on {SECOND}")
    if function._schema.name.endswith("_"):
        return args[0]
    return tree_map(
        lambda value: OnSecondDevice(value) if isinstance(value, torch.Tensor) and device == SECOND else value, result
    )


def moving_its_input(layer_class):
    """A layer as under the hooks of Accelerate: hooks on the call see the input before it is moved."""

    class Moving(layer_class):
        def forward(self, *args, **kwargs):
            device = next(self.parameters()).device
            return super().forward(*(x.to(device) for x in args), **kwargs)

    return Moving


class OfAllTypes(nn.Module):
    """Embedding and convolution on the second device, the rest on the first, and back to the second."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = moving_its_input(nn.Embedding)(9, 6)
        self.first = moving_its_input(nn.Linear)(6, 6)
        self.convolution = moving_its_input(nn.Conv1d)(6, 4, 3)
        self.attention = moving_its_input(nn.MultiheadAttention)(4, 2, batch_first=True)
        self.last = moving_its_input(nn.Linear)(4, 3)

    def forward(self, ids):
        x = torch.tanh(self.first(self.embedding(ids)))
        x = torch.tanh(self.convolution(x.mT)).mT.to(HOST)
        x = self.attention(x, x, x, need_weights=False)[0].to(HOST)
        return self.last(x).square().sum((1, 2)).mean()


def move(model):
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            module._parameters[key] = nn.Parameter(OnSecondDevice(parameter.detach()), parameter.requires_grad)


def test_layers_on_several_devices():
    torch.manual_seed(1)
    batches = [torch.randint(0, 9, (3, 7)) for _ in range(2)]
    names = ["embedding", "first", "convolution", "attention", "last"]

    def layers(model):
        return {name: model.get_submodule(name) for name in names}

    model, values = OfAllTypes().double(), {name: [] for name in names}
    for batch in batches:
        for row in range(3):
            model.zero_grad()
            model(batch[row : row + 1]).backward()
            for name, layer in layers(model).items():
                weights = [value.grad for key, value in layer.named_parameters() if key.endswith("weight")]
                values[name].append(torch.cat([gradient.flatten() for gradient in weights]).square().mean())
    truth = {name: torch.stack(value) for name, value in values.items()}

    model = OfAllTypes()
    with TwoDevices():
        for name in ("embedding", "convolution", "attention", "last"):
            move(model.get_submodule(name))
        with pytest.raises(RuntimeError, match="of tensors on"):
            nn.Linear.forward(model.last, torch.randn(2, 4))
        scores = calibrate_norms(model, layers(model), batches, 2, show_progress_bar=False)
    assert_scores(scores, truth)


def spectrum_and_factors(model, data, monkeypatch):
    """The spectrum of the adapter, and the factors of its first components, before they are written into the model."""
    spectrum, found = spectrum_of(model, data), []
    maps = {name: core_map(layer.left, layer.right, [0]) for name, layer in spectrum.items()}
    with monkeypatch.context() as patched:
        patched.setattr(truncate, "resize_adapter", lambda *arguments: found.append(arguments[-1]))
        truncate.truncate_adapter(model, lora_layers_of(model), "default", maps, {}, model.peft_config["default"])
    return spectrum, found[0]


def test_a_trained_adapter_on_a_device_without_float64(monkeypatch):
    expected, factors = spectrum_and_factors(every_type(), batches(), monkeypatch)
    model = every_type()
    with TwoDevices():
        move(model)
        data = [{"ids": OnSecondDevice(batch["ids"])} for batch in batches()]
        spectrum, moved = spectrum_and_factors(model, data, monkeypatch)
        without_data = get_lora_spectrum(model, None)
    assert without_data == get_lora_spectrum(every_type(), None)
    for name, layer in expected.items():
        assert spectrum[name].saliencies == pytest.approx(layer.saliencies, rel=1e-4)
        assert spectrum[name].gains == pytest.approx(layer.gains, rel=1e-4)
        for found, truth in zip(moved[name], factors[name], strict=True):
            torch.testing.assert_close(found.a.value, truth.a, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found.b.value, truth.b, rtol=1e-4, atol=1e-4)


def test_scores_on_a_device_without_float64():
    names = list(lora_layers(fim_model()))
    scores = {name: torch.rand(3, 2, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(names)}
    expected = initialize_lora_fim_ranks(fim_model(), fim_scores=scores)
    with TwoDevices():
        there = {name: OnSecondDevice(score) for name, score in scores.items()}
        found = initialize_lora_fim_ranks(fim_model(), fim_scores=there)
    assert (found.ranks, found.scores.to_dict()) == (expected.ranks, expected.scores.to_dict())
