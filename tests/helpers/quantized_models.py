"""A tiny Llama that quantization changes, and its dequantized copy."""

import importlib

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.tiny_models import VOCABULARY, names_of

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def float_llama():
    """Wide enough for blocks of 64. The large first column of every weight makes quantization inexact."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name in names_of(model, *TARGETS):
            model.get_submodule(name).weight[:, 0] *= 4
    return model


def dequantized(layer):
    weight = layer.weight
    if type(weight).__name__ == "Int8Params":
        return weight.CB.double() * weight.SCB.double()[:, None] / 127
    if type(weight).__name__ == "Params4bit":
        return importlib.import_module("bitsandbytes").functional.dequantize_4bit(weight, weight.quant_state).double()
    return weight.dequantize().double()


def dequantized_model(quantized):
    """The same model with plain `nn.Linear`, in float64. `quantized` must be unused, because some libraries repack."""
    model = float_llama().double()
    for name in names_of(model, *TARGETS):
        model.get_submodule(name).weight.data = dequantized(quantized.get_submodule(name))
    return model


def worst_error(scores, truth):
    return max(abs(scores[name].mean / values.mean().item() - 1) for name, values in truth.items())
