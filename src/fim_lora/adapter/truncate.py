"""Truncation of a trained adapter to some of its components, for good or inside a block."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim import Optimizer

from ..fisher.gradients.products import without_autocast
from ..runtime.optimizer_state import StateMap, carried_state, set_state
from .config_writer import config_with_ranks
from .factors import Weights, weights_of
from .lora_layers import layers_rebuilt_together
from .resize import Factors, resize_adapter

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class CoreMap:
    """Linear maps of the ranks of one layer's adapter: `A' = rows · A` and `B' = B · columns` for every part.

    Attributes:
        rows: (P × k × r).
        columns: (P × r × k).
        scaling_ratio: New scaling of the layer over the old one.
    """

    rows: Tensor
    columns: Tensor
    scaling_ratio: float = 1.0


def core_map(left: Array, right: Array, indices: Sequence[int], scaling_ratio: float = 1.0) -> CoreMap:
    """The map to the components of these numbers, from their columns `left` and rows `right` (P × r × r)."""
    rows = torch.from_numpy(np.ascontiguousarray(right[:, list(indices), :], np.float64))
    columns = torch.from_numpy(np.ascontiguousarray(left[:, :, list(indices)], np.float64))
    return CoreMap(rows, columns / scaling_ratio, scaling_ratio)


def truncate_adapter(
    model: nn.Module,
    layers: Mapping[str, LoraLayer],
    adapter_name: str,
    maps: Mapping[str, CoreMap],
    alphas: Mapping[str, float],
    new_config: LoraConfig,
    optimizer: Optimizer | None = None,
) -> None:
    """Give the adapter the components of `maps`, in place; a layer without an entry keeps all of its weights.

    A map with no rows removes the adapter of the layer. The `nn.Parameter` objects stay, and the state of `optimizer`
    goes on in the new shapes. A failed call changes nothing; see `resize_adapter` for what it raises.
    """
    ranks: dict[str, int] = {}
    factors: dict[str, list[Factors]] = {}
    state_maps: dict[nn.Parameter, StateMap] = {}
    removed: dict[nn.Parameter, None] = {}
    for name, layer in layers.items():
        ranks[name] = layer.r[adapter_name]
        weights, mapped = weights_of(layer, adapter_name), maps.get(name)
        if mapped is None:
            factors[name] = [_with_bias(part, adapter_name, one.a, one.b, 1.0) for part, one in _parts(layer, weights)]
            continue
        ranks[name] = _rank_after(layer, adapter_name, mapped)
        if ranks[name] == 0:
            removed.update({parameter: None for one in weights for parameter in (one.a, one.b)})
            continue
        balanced = [_balanced(one, part) for one, part in zip(weights, _maps_by_weights(mapped, weights), strict=True)]
        factors[name] = [
            _with_bias(
                part,
                adapter_name,
                one.with_rows(one.a.detach(), own.rows),
                one.with_columns(one.b.detach(), own.columns),
                own.scaling_ratio,
            )
            for (part, one), own in zip(_parts(layer, weights), balanced, strict=True)
        ]
        for one, own in zip(weights, balanced, strict=True):
            state_maps.update(_state_maps(one, own))
    state = {} if optimizer is None else carried_state(optimizer, state_maps)
    resize_adapter(model, layers, adapter_name, ranks, alphas, new_config, factors)
    if optimizer is not None:
        set_state(optimizer, state, removed)


@contextmanager
def truncated_weights(
    layers: Mapping[str, LoraLayer], adapter_name: str, maps: Mapping[str, CoreMap]
) -> Iterator[None]:
    """Inside the block, A and B have only the components of `maps`, at their present shapes: the rest is zero."""
    before: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for name, mapped in maps.items():
            weights = weights_of(layers[name], adapter_name)
            for one, own in zip(weights, _maps_by_weights(mapped, weights), strict=True):
                before += [(one.a, one.a.data), (one.b, one.b.data)]
                padded = _padded(own)
                one.a.data, one.b.data = (
                    one.with_rows(one.a.data, padded.rows),
                    one.with_columns(one.b.data, padded.columns * own.scaling_ratio),
                )
        torch.clear_autocast_cache()  # an autocast around the call keeps casts of the weights before
        yield
    finally:
        for parameter, values in before:
            parameter.data = values
        torch.clear_autocast_cache()


def config_after_truncation(
    config: LoraConfig,
    ranks: Mapping[str, int],
    ranks_before: Mapping[str, int],
    scalings: Mapping[str, float],
    serving: bool,
) -> tuple[LoraConfig, dict[str, float]]:
    """The config of the truncated adapter and the `lora_alpha` of every layer, for these scalings.

    Its global `r` is the largest rank and its global `lora_alpha` that of a layer of this rank, so a server that reads
    only these accepts the adapter. The initialization becomes PEFT's default, which needs nothing when the adapter is
    loaded. The `lora_alpha` of a layer of rank 0 is that of its rank before. Raises as `config_with_ranks`.
    """
    alphas = {
        name: _alpha(scalings[name], rank or ranks_before[name], config.use_rslora) for name, rank in ranks.items()
    }
    largest = max(ranks, key=lambda name: ranks[name])
    base = copy.deepcopy(config)
    base.r, base.lora_alpha = ranks[largest], alphas[largest]
    base.init_lora_weights = True
    if getattr(base, "eva_config", None) is not None:
        base.eva_config = None  # PEFT would warn about it whenever the adapter is loaded
    return config_with_ranks(base, ranks, alphas, serving=serving), alphas


def _alpha(scaling: float, rank: int, use_rslora: bool) -> float:
    alpha = scaling * (math.sqrt(rank) if use_rslora else rank)
    # PEFT documents `lora_alpha` as an integer, and some readers of the config require one.
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha


def _parts(layer: LoraLayer, weights: Sequence[Weights]) -> list[tuple[Any, Weights]]:
    return list(zip(layers_rebuilt_together(layer), weights, strict=True))


def _rank_after(layer: Any, adapter_name: str, mapped: CoreMap) -> int:
    """Rank as PEFT counts it: over all groups of a convolution, and of one expert."""
    before, after = mapped.rows.shape[2], mapped.rows.shape[1]
    rank: int = layer.r[adapter_name] // before * after
    return rank


def _maps_by_weights(mapped: CoreMap, weights: Sequence[Weights]) -> list[CoreMap]:
    """Divide the P parts among the layers that PEFT rebuilds together."""
    sizes = [one.form.num_parts for one in weights]
    parts = zip(mapped.rows.split(sizes), mapped.columns.split(sizes), strict=True)
    return [CoreMap(rows, columns, mapped.scaling_ratio) for rows, columns in parts]


def _balanced(weights: Weights, mapped: CoreMap) -> CoreMap:
    """Give the row of A and the column of B of each component the same norm, so that both learn at one pace."""
    a, b = weights.matrices()
    with without_autocast(a.device.type):
        norms_a = torch.linalg.vector_norm(mapped.rows.to(a) @ a, dim=2)
        norms_b = torch.linalg.vector_norm(b @ mapped.columns.to(b), dim=1)
    is_defined = (norms_a > 0) & (norms_b > 0)
    factor = torch.where(is_defined, (norms_b / norms_a).sqrt(), 1.0).cpu().double()
    return CoreMap(mapped.rows * factor[:, :, None], mapped.columns / factor[:, None, :], mapped.scaling_ratio)


def _padded(mapped: CoreMap) -> CoreMap:
    missing = mapped.rows.shape[2] - mapped.rows.shape[1]
    rows = nn.functional.pad(mapped.rows, (0, 0, 0, missing))
    columns = nn.functional.pad(mapped.columns, (0, missing))
    return CoreMap(rows, columns, mapped.scaling_ratio)


def _with_bias(layer: Any, adapter_name: str, a: Tensor, b: Tensor, scaling_ratio: float) -> Factors:
    """Factors with the bias of B, which the scaling multiplies, too."""
    bias = getattr(layer.lora_B[adapter_name], "bias", None) if adapter_name in layer.lora_B else None
    return Factors(a.detach(), b.detach(), None if bias is None else bias.detach() / scaling_ratio)


def _state_maps(weights: Weights, mapped: CoreMap) -> dict[nn.Parameter, StateMap]:
    """`∂ℓ/∂A' = ρ · columnsᵀ · ∂ℓ/∂A` and `∂ℓ/∂B' = ρ · ∂ℓ/∂B · rowsᵀ`, with ρ the ratio of the scalings."""
    rows, columns = mapped.scaling_ratio * mapped.columns.mT, mapped.scaling_ratio * mapped.rows.mT
    return {
        weights.a: StateMap(
            lambda value: weights.with_rows(value, rows), lambda value: weights.with_rows(value, rows.square())
        ),
        weights.b: StateMap(
            lambda value: weights.with_columns(value, columns),
            lambda value: weights.with_columns(value, columns.square()),
        ),
    }
