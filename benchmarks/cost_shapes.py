"""Models with random weights: time and memory do not depend on the values of the weights."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

PREFIX = "shape:"
"""Marks the name of a shape, in place of the name of a model."""


def _llama(hidden: int, inner: int, blocks: int, heads: int, groups: int, vocabulary: int, tied: bool) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
        use_cache=False,
    )


SHAPES = {
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49152, True),
    "smollm2-360m": _llama(960, 2560, 32, 15, 5, 49152, True),
    "smollm2-1.7b": _llama(2048, 8192, 24, 32, 32, 49152, True),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128256, False),
    "1001-layers": _llama(64, 128, 143, 4, 2, 1024, True),
    "1001-wide-layers": _llama(576, 1536, 143, 9, 3, 49152, True),
}
"""Configurations by name. The last two have 7 × 143 linear layers: small ones, and ones as in SmolLM2-135M."""


def random_model(name: str, device: torch.device) -> nn.Module:
    """Make a causal language model in float32 of one of the `SHAPES`.

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in SHAPES:
        raise ValueError(f"Unknown shape {name!r}: choose one of {', '.join(SHAPES)}.")
    with device:
        model: nn.Module = LlamaForCausalLM(SHAPES[name])
    return model


def in_four_bits(model: Any, device: torch.device) -> nn.Module:
    """Quantize linear layers to NF4 with double quantization, as in QLoRA. Requires bitsandbytes.

    Args:
        model: A causal language model, whose dtype becomes that of the computation.
        device: Device of the model.

    Returns:
        The same model, in which all linear layers except the head are replaced.
    """
    bitsandbytes = importlib.import_module("bitsandbytes")
    options = {"compress_statistics": True, "quant_type": "nf4"}
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name, module in linear:
        if module is model.get_output_embeddings():
            continue
        quantized = bitsandbytes.nn.Linear4bit(
            module.in_features, module.out_features, False, model.dtype, device=torch.device("meta"), **options
        )
        weight = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False, module=quantized, **options)
        quantized.weight = weight.to(device)
        model.set_submodule(name, quantized)
    model.is_loaded_in_4bit = True  # PEFT reads this attribute
    quantized_model: nn.Module = model
    return quantized_model


def random_batches(
    vocabulary: int, batch_size: int, length: int, number: int, device: torch.device
) -> list[dict[str, Tensor]]:
    """Make batches of random tokens without padding.

    Args:
        vocabulary: Number of different tokens.
        batch_size: Sequences in a batch.
        length: Tokens in a sequence.
        number: Number of batches.
        device: Device of the batches.

    Returns:
        Batches of token ids, mask and labels (batch_size × length).
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (number, batch_size, length), generator=generator).to(device)
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x.clone()} for x in ids]


def pass_operations(model: Any, batch_size: int, length: int) -> float:
    """Floating-point operations of one forward pass and one backward pass with respect to activations only.

    Every matrix product with a weight counts `2 · tokens · entries` operations forward and as many backward. Causal
    attention counts half of `4 · T² · d` forward and half of `8 · T² · d` backward for each block and sequence. All
    other operations are ignored, so the result is a lower bound.

    Args:
        model: A causal language model whose config has `num_hidden_layers` and `hidden_size` (d).
        batch_size: Sequences in a batch.
        length: Tokens in a sequence (T).

    Returns:
        Operations of one batch.
    """
    config = model.config
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    weights: int = sum(module.in_features * module.out_features for module in linear)
    attention: int = config.num_hidden_layers * config.hidden_size
    return 4.0 * batch_size * length * weights + 6.0 * batch_size * length**2 * attention
