"""A layer with packed weights under PEFT's LoRA layers for quantization libraries that are not installed here."""

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from fim_lora import get_fim_scores, initialize_lora_fim_ranks
from helpers.adapters import fim_lora_config, logits, run_own_loop
from helpers.quantized_models import worst_error
from helpers.tiny_models import llama, lm_batches, names_of, per_example_scores


class Product(torch.autograd.Function):
    """`x Wᵀ` with a gradient for `x` only, as in the kernels of these libraries."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight.mT

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.saved_tensors[0], None


class PackedLinear(nn.Module):
    """Four bits per entry and a scale per row. Neither an `nn.Linear` nor a layer with a weight parameter."""

    packed_name = "qweight"

    def __init__(self, linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        weight = linear.weight.detach()
        scales = weight.abs().amax(1, keepdim=True) / 7
        levels = (weight / scales).round().to(torch.int32) + 8
        self.register_buffer(self.packed_name, (levels[:, ::2] | levels[:, 1::2] << 4).to(torch.uint8))
        self.register_buffer("scales", scales)

    def dequantized(self):
        packed = getattr(self, self.packed_name)
        levels = torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)
        return (levels.to(self.scales.dtype) - 8) * self.scales

    def forward(self, x):
        return Product.apply(x, self.dequantized())


PACKED = ("q_proj", "v_proj", "down_proj")


def packed_llama(layer_class):
    model = llama().double()
    for name in names_of(model, *PACKED):
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer_class(model.get_submodule(name)))
    return model


def truth_of_packed():
    model, packed = llama().double(), packed_llama(PackedLinear)
    names = names_of(model, *PACKED)
    for name in names:
        model.get_submodule(name).weight.data = packed.get_submodule(name).dequantized()
    return per_example_scores(model, lm_batches(), names)


def assert_scores_of_packed_layers(layer_class, lora_class_name, register=None):
    """Checks the scores in all three ways; `register` is PEFT's LoRA class if PEFT does not find it by itself."""
    truth = truth_of_packed()
    original = per_example_scores(llama(), lm_batches(), list(truth))
    assert worst_mean_difference(original, truth) > 1e-2

    def config():
        config = fim_lora_config(target_modules=PACKED)
        if register is not None:
            config._register_custom_module({layer_class: register})
        return config

    plain = get_fim_scores(packed_llama(layer_class), lm_batches(), config(), show_progress_bar=False)
    by_loader = get_peft_model(packed_llama(layer_class), config())
    by_loop = get_peft_model(packed_llama(layer_class), config())
    assert {type(module).__name__ for module in by_loop.modules() if isinstance(module, LoraLayer)} == {
        lora_class_name
    }
    run_own_loop(by_loop)
    for scores in (
        plain,
        initialize_lora_fim_ranks(by_loader, lm_batches(), show_progress_bar=False).scores,
        initialize_lora_fim_ranks(by_loop).scores,
    ):
        assert worst_error(scores, truth) < 1e-6  # Llama's norms and rotations compute in float32
        assert scores["model.layers.0.mlp.down_proj"].shape == (24, 40)
    assert torch.equal(logits(by_loop), logits(packed_llama(layer_class)))


def worst_mean_difference(one, other):
    return max(abs(one[name].mean().item() / values.mean().item() - 1) for name, values in other.items())


FP8_MODULE = "neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules"
# PEFT's LoRA layer, module and class of the layer that it adapts, and the name of the packed weight in that layer.
LIBRARIES = [
    ("HqqLoraLinear", "hqq.core.quantize", "HQQLinear", "W_q"),
    ("EetqLoraLinear", "eetq", "EetqLinear", "weight"),
    ("IncLoraLinear", FP8_MODULE, "PatchedLinear", "weight"),
]
