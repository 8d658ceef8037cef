"""Embeddings: row i of `G_t` is the sum of `g` over the positions of example t that hold id i."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..gradients.entries import add_squared_embedding_entries
from ..gradients.products import MAX_TEMPORARY_BYTES, compute_dtype, slices
from .attribution import by_leading_dimension, concatenate_calls, flatten_positions
from .call import LayerCall
from .components import AdaptedLayer, ComponentMoments, moments_of_positions, register_component_type
from .entries_registry import register_entries
from .registry import TargetLayer, WeightShape, base_layer_of, register_layer_type


def _embedding_shape(layer: Any) -> WeightShape:
    base = base_layer_of(layer)
    return WeightShape(base.embedding_dim, base.num_embeddings)


@register_layer_type(nn.Embedding, weight_shape=_embedding_shape)
def measure_embedding(target: TargetLayer, calls: Sequence[LayerCall], batch_size: int) -> Tensor:
    """`‖G_t‖²_F` (B) from ids (B × …) and gradients (B × … × d).

    The row of `padding_idx` has no gradient, as in PyTorch. If the layer has an `embed_scale`, its output and
    therefore its gradient include it, as in PEFT. Raises `UnattributableError` if ids do not belong to an example,
    such as positions that all examples share, and `TypeError` if the layer looks up other ids than its input.
    """
    ids, g = _positions(target, calls, batch_size)
    scale = float(getattr(target.module, "embed_scale", 1.0))
    return embedding_squared_norms(ids, g, target.module.padding_idx) * scale**2


def _base_layer_of(layer: Any, adapter_name: str) -> Any:
    return base_layer_of(layer)


@register_component_type("peft.tuners.lora.layer.Embedding", observed="input", module=_base_layer_of)
def measure_embedding_components(
    target: AdaptedLayer, calls: Sequence[LayerCall], batch_size: int
) -> ComponentMoments:
    """Moments of one part: h is the column of A at the id, and `u = s · Bᵀ g`.

    Raises `UnattributableError`, and `ValueError` if A or B is sharded, because PEFT stores them in no module of
    their own.
    """
    _require_lookup(target)
    lora, name = target.lora, target.adapter_name
    a, b = lora.lora_embedding_A[name].detach(), lora.lora_embedding_B[name].detach()
    if a.numel() == 0 or isinstance(a, DTensor):
        raise ValueError(
            f"The adapter of the embedding {target.name!r} is sharded: measure the spectrum on one device, or leave "
            "the embedding out of the adapter."
        )
    scale = float(getattr(target.module, "embed_scale", 1.0)) * lora.scaling[name]
    pairs = [by_leading_dimension(call.input, call.gradient, batch_size) for call in calls]
    positions = [(ids.reshape(batch_size, -1), flatten_positions(g)) for ids, g in pairs]
    return moments_of_positions([[(a.T[ids], (g.to(b.dtype) @ b) * scale) for ids, g in positions]])


def embedding_squared_norms(
    ids: Tensor, g: Tensor, padding_idx: int | None = None, max_temporary_bytes: int = MAX_TEMPORARY_BYTES
) -> Tensor:
    """`‖G_t‖²_F` (B), in float32 or float64, from ids of any integer type (B × T) and gradients `g` (B × T × d).

    The row of `padding_idx` has no gradient. `max_temporary_bytes` bounds the temporary memory: sums over positions
    for some of the features.
    """
    dtype = compute_dtype(g, g)
    examples, positions, features = g.shape
    if positions == 0:
        return g.new_zeros(examples, dtype=dtype)
    num_ids = ids.max() + 1
    example_index = torch.arange(examples, device=ids.device).unsqueeze(1)
    pairs, pair_of_position = torch.unique((example_index * num_ids + ids).flatten(), return_inverse=True)
    size = max(max_temporary_bytes // (2 * examples * positions * dtype.itemsize), 1)
    by_pair = g.new_zeros(len(pairs), dtype=dtype)
    for columns in slices(features, size):
        block = g[:, :, columns].flatten(0, 1).to(dtype)
        sums = block.new_zeros(len(pairs), block.shape[1]).index_add_(0, pair_of_position, block)
        by_pair += sums.square_().sum(1)
    if padding_idx is not None:
        by_pair[pairs % num_ids == padding_idx] = 0
    return by_pair.new_zeros(examples).index_add_(0, pairs // num_ids, by_pair)


def _embedding_entries_shape(target: TargetLayer) -> tuple[int, int]:
    return target.module.num_embeddings, target.module.embedding_dim


@register_entries(measure_embedding, entries_shape=_embedding_entries_shape)
def add_embedding_entries(
    total: Tensor, target: TargetLayer, calls: Sequence[LayerCall], batch_size: int, factor: float
) -> None:
    """`total += factor · Σ_t G_t ∘ G_t`; arguments and errors are those of `measure_embedding`."""
    ids, g = _positions(target, calls, batch_size)
    scale = float(getattr(target.module, "embed_scale", 1.0))
    add_squared_embedding_entries(total, ids, g, factor * scale**2, target.module.padding_idx)


def _require_lookup(target: TargetLayer) -> None:
    """Refuse a subclass that looks up other ids than those it is given, such as the positions of OPT or Whisper.

    It is recognized by the further arguments of its `forward`, from which it computes the ids.
    """
    layer = type(target.module)
    kinds = [parameter.kind for parameter in inspect.signature(layer.forward).parameters.values()]
    if sum(kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD) for kind in kinds) > 2:
        raise TypeError(
            f"Layer {target.name!r} is a {layer.__name__}, which looks up other ids than those it is given, so its "
            "eFIM is not known. Remove it from `target_modules`, or add it to `exclude_modules`."
        )


def _positions(target: TargetLayer, calls: Sequence[LayerCall], batch_size: int) -> tuple[Tensor, Tensor]:
    """Ids (B × T) and gradients (B × T × d) of all calls. Raises `UnattributableError`, and `TypeError`."""
    _require_lookup(target)
    pairs = [by_leading_dimension(call.input, call.gradient, batch_size) for call in calls]
    return concatenate_calls([(ids.reshape(batch_size, -1), flatten_positions(g)) for ids, g in pairs])
