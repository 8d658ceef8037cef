"""Models by configuration, with random weights: time and memory do not depend on what the weights are."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

PREFIX = "shape:"
"""Before the name of a shape, where else a model is named."""


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
"""Name to configuration; the last two have 7 × 143 linear layers, small ones and those of SmolLM2-135M."""


def random_model(name: str, device: torch.device) -> nn.Module:
    """A model of a shape.

    Args:
        name: Key of `SHAPES`.
        device: Where to put it.

    Returns:
        A causal language model in float32.

    Raises:
        ValueError: If there is no such shape.
    """
    if name not in SHAPES:
        raise ValueError(f"There is no shape {name!r}: choose one of {', '.join(SHAPES)}.")
    with device:
        model: nn.Module = LlamaForCausalLM(SHAPES[name])
    return model


def in_four_bits(model: Any, device: torch.device) -> nn.Module:
    """The model with linear layers in NF4 with double quantisation, as QLoRA has them.

    Args:
        model: A causal language model; its dtype is that of the computation.
        device: Where it is.

    Returns:
        The same model, in which all linear layers but the head are others. bitsandbytes has to be installed.
    """
    bitsandbytes = importlib.import_module("bitsandbytes")
    options = {"compress_statistics": True, "quant_type": "nf4"}
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name, module in linear:
        if module is model.get_output_embeddings():
            continue
        quantised = bitsandbytes.nn.Linear4bit(
            module.in_features, module.out_features, False, model.dtype, device=torch.device("meta"), **options
        )
        weight = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False, module=quantised, **options)
        quantised.weight = weight.to(device)
        model.set_submodule(name, quantised)
    model.is_loaded_in_4bit = True  # PEFT asks for it
    quantised_model: nn.Module = model
    return quantised_model


def random_batches(
    vocabulary: int, batch_size: int, length: int, number: int, device: torch.device
) -> list[dict[str, Tensor]]:
    """Batches of random tokens without padding.

    Args:
        vocabulary: Tokens to draw from.
        batch_size: Sequences in a batch.
        length: Tokens in a sequence.
        number: Batches.
        device: Where to put them.

    Returns:
        Batches with labels.
    """
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (number, batch_size, length), generator=draw).to(device)
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x.clone()} for x in ids]


def pass_operations(model: Any, batch_size: int, length: int) -> float:
    """Floating-point operations of one forward pass and one backward pass for the gradients of activations alone.

    Of every matrix product with a weight, `2 · tokens · entries` forward and as many backward. Of attention, which is
    causal, half of `4 · T² · d` forward and of `8 · T² · d` backward for each block and sequence. Nothing else counts,
    so it is a lower bound.

    Args:
        model: A causal language model whose config names `num_hidden_layers`, `num_attention_heads` and `hidden_size`.
        batch_size: Sequences in a batch.
        length: T, tokens in a sequence.

    Returns:
        Operations of one batch.
    """
    config = model.config
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    weights: int = sum(module.in_features * module.out_features for module in linear)
    attention: int = config.num_hidden_layers * config.hidden_size
    return 4.0 * batch_size * length * weights + 6.0 * batch_size * length**2 * attention
