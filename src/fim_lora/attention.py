"""`nn.MultiheadAttention` taken apart into its four linear projections and the attention between them."""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .calls import LayerCall

_ARGUMENTS = inspect.signature(nn.MultiheadAttention.forward)
_PASSED_ON = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")


def attention_matrices(layer: nn.MultiheadAttention, call: LayerCall) -> list[tuple[Tensor, Tensor]]:
    """Inputs and output gradients of the projections of query, key, value and output.

    The attention itself is PyTorch's own function, run again between projections that are the identity, with the
    random numbers of the call, so masks, added biases and dropout are what they were.

    Args:
        layer: The base layer, whose query, key and value have one width d.
        call: A call with query (B × T × d, T × B × d as `batch_first` says, or T × d) and so on, and the gradient of
            its first output.

    Returns:
        Four pairs `x` (B × T × d) and `g` (B × T × d); without a batch B is 1.
    """
    given = _ARGUMENTS.bind(layer, *call.args, **call.kwargs)
    given.apply_defaults()
    arguments = given.arguments
    inputs = [arguments[name] for name in ("query", "key", "value")]
    gradient = call.gradient
    batched = gradient.ndim == 3
    if batched and layer.batch_first:
        inputs, gradient = [x.transpose(0, 1) for x in inputs], gradient.transpose(0, 1)

    weights = layer.in_proj_weight.detach().chunk(3)
    biases = [None] * 3 if layer.in_proj_bias is None else layer.in_proj_bias.detach().chunk(3)
    with torch.enable_grad(), call.replayed():
        query, key, value = (
            F.linear(x, weight, bias).requires_grad_() for x, weight, bias in zip(inputs, weights, biases, strict=True)
        )
        identity = torch.eye(layer.embed_dim, dtype=query.dtype, device=query.device)
        attended, _ = F.multi_head_attention_forward(
            query,
            key,
            value,
            embed_dim_to_check=layer.embed_dim,
            num_heads=layer.num_heads,
            in_proj_weight=None,
            in_proj_bias=None,
            bias_k=layer.bias_k,
            bias_v=layer.bias_v,
            add_zero_attn=layer.add_zero_attn,
            dropout_p=layer.dropout,
            out_proj_weight=identity,
            out_proj_bias=None,
            training=layer.training,
            use_separate_proj_weight=True,
            q_proj_weight=identity,
            k_proj_weight=identity,
            v_proj_weight=identity,
            **{name: arguments[name] for name in _PASSED_ON},
        )
    behind = layer.out_proj.weight.detach().to(gradient.dtype)  # as autocast has it
    gradients = torch.autograd.grad(attended, (query, key, value), (gradient @ behind).to(attended.dtype))
    pairs = [*zip(inputs, gradients, strict=True), (attended.detach(), gradient)]
    return [(x.transpose(0, 1), g.transpose(0, 1)) if batched else (x[None], g[None]) for x, g in pairs]
