"""`nn.MultiheadAttention`: four linear projections and the attention between them."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...runtime.flags import requires_grad_restored
from ...runtime.offloading import onloaded
from ..gradients.norms import squared_norms
from .attribution import UnattributableError, by_leading_dimension, concatenate_calls, flatten_positions
from .call import LayerCall
from .components import AdaptedLayer, ComponentMoments, moments_of_core_gradients, register_component_type, whole_layer
from .registry import TargetLayer, WeightShape, base_layer_of, register_layer_type

_SIGNATURE = inspect.signature(nn.MultiheadAttention.forward)

# Arguments that the layer hands on to PyTorch's attention function.
_ATTENTION_OPTIONS = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")


def _attention_shape(layer: Any) -> WeightShape:
    """One adapter of rank r for the three input projections together, and one for the output projection."""
    width = base_layer_of(layer).embed_dim
    return WeightShape(3 * width, width, num_entries=4 * width**2, parameters_per_rank=6 * width)


def _batch_dimension(layer: Any) -> tuple[int, ...]:
    return (0,) if base_layer_of(layer).batch_first else (1,)


@register_layer_type(
    nn.MultiheadAttention, weight_shape=_attention_shape, needs_replay=True, batch_dimensions=_batch_dimension
)
def measure_attention(target: TargetLayer, calls: Sequence[LayerCall], batch_size: int) -> Tensor:
    """`‖G_t‖²_F` (B), summed over `in_proj_weight` and `out_proj.weight`, which PEFT adapts at one rank.

    Only the gradient of the first output counts. Raises `UnattributableError`.
    """
    with onloaded(target.module, target.module.out_proj):
        by_call = [_inputs_and_gradients(target.module, call) for call in calls]
    norms = []
    for pairs in zip(*by_call, strict=True):
        attributed = [by_leading_dimension(x, g, batch_size) for x, g in pairs]
        x, g = concatenate_calls([(flatten_positions(x), flatten_positions(g)) for x, g in attributed])
        norms.append(squared_norms(x, g))
    return torch.stack(norms).sum(0)


@register_component_type("peft.tuners.lora.layer.MultiheadAttention", observed="call", module=whole_layer)
def measure_attention_components(
    target: AdaptedLayer, calls: Sequence[LayerCall], batch_size: int
) -> ComponentMoments:
    """Moments of two parts, the input projections together and the output projection.

    PEFT merges both adapters into the weights while the layer runs. So it runs again, with the random numbers of the
    call, and the gradients of A for one example after another give `∂ℓ_t/∂A · Aᵀ = s · Bᵀ G_t Aᵀ = Γ_t`. Examples do
    not interact in an attention. Raises `UnattributableError`.
    """
    layer, name = target.lora, target.adapter_name
    weights = [part.lora_A[name].weight for part in (layer, layer.base_layer.out_proj)]
    core: Tensor | None = None
    with onloaded(target.base_layer, target.base_layer.out_proj), requires_grad_restored(weights):
        for weight in weights:
            weight.requires_grad_(True)
        for call in calls:
            with torch.enable_grad(), call.restored_state():
                output = layer.forward(*call.args, **call.kwargs)[0]
            by_example = []
            for seed in _seeds_by_example(target.base_layer, call.gradient, batch_size):
                gradients = torch.autograd.grad(output, weights, seed.to(output.dtype), retain_graph=True)
                by_example.append(_core_gradients(gradients, weights))
            core = torch.stack(by_example) if core is None else core + torch.stack(by_example)
    assert core is not None  # a layer is measured after its calls
    return moments_of_core_gradients(core)


def _seeds_by_example(layer: nn.MultiheadAttention, gradient: Tensor, batch_size: int) -> list[Tensor]:
    """The gradient of the output for each example: zero in all places of the others."""
    examples_first = gradient.ndim < 3 or layer.batch_first
    place = torch.arange(gradient.shape[0 if examples_first else 1], device=gradient.device)
    if gradient.ndim < 3:
        place = torch.zeros(1, device=gradient.device)
    if len(place) % batch_size:
        raise UnattributableError
    example_of_place = place // (len(place) // batch_size)
    shape = [1] * gradient.ndim
    shape[0 if examples_first else 1] = len(place)
    return [gradient * (example_of_place == example).view(shape) for example in range(batch_size)]


def _core_gradients(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """`Γ` (2 × r × r) of one example."""
    dtype = torch.promote_types(weights[0].dtype, torch.float32)
    pairs = zip(gradients, weights, strict=True)
    return torch.stack([gradient.to(dtype) @ weight.detach().to(dtype).T for gradient, weight in pairs])


def _inputs_and_gradients(layer: nn.MultiheadAttention, call: LayerCall) -> list[tuple[Tensor, Tensor]]:
    """Inputs and output gradients (B × T × d) of the projections of query, key, value and output.

    Query, key and value have one width d, and are B × T × d or T × B × d according to `batch_first`, or T × d, where B
    is 1. The attention is run again with the random numbers of the call, to get its gradients.
    """
    bound = _SIGNATURE.bind(layer, *call.args, **call.kwargs)
    bound.apply_defaults()
    inputs: list[Tensor] = [bound.arguments[name] for name in ("query", "key", "value")]
    gradient = call.gradient
    is_batched = gradient.ndim == 3
    if is_batched and layer.batch_first:
        inputs, gradient = [x.transpose(0, 1) for x in inputs], gradient.transpose(0, 1)

    with torch.enable_grad(), call.restored_state():
        projected = _project_inputs(layer, inputs)
        attended = _attend(layer, projected, {name: bound.arguments[name] for name in _ATTENTION_OPTIONS})
    output_weight = layer.out_proj.weight.detach().to(gradient.dtype)  # the dtype of the projection under autocast
    gradients = torch.autograd.grad(attended, projected, (gradient @ output_weight).to(attended.dtype))
    pairs = [*zip(inputs, gradients, strict=True), (attended.detach(), gradient)]
    return [(x.transpose(0, 1), g.transpose(0, 1)) if is_batched else (x[None], g[None]) for x, g in pairs]


def _project_inputs(layer: nn.MultiheadAttention, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Query, key and value after their projections, as leaves of a new graph."""
    weights = layer.in_proj_weight.detach().chunk(3)
    biases = [None] * 3 if layer.in_proj_bias is None else layer.in_proj_bias.detach().chunk(3)
    return [
        F.linear(x, weight, bias).requires_grad_() for x, weight, bias in zip(inputs, weights, biases, strict=True)
    ]


def _attend(layer: nn.MultiheadAttention, projected: Sequence[Tensor], options: Mapping[str, Any]) -> Tensor:
    """The input of the output projection, computed by PyTorch's own attention function with identity projections.

    Masks, added biases and dropout are therefore those of the call.
    """
    query, key, value = projected
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
        **options,
    )
    return attended
