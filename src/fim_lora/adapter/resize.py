"""New ranks for a LoRA adapter, by PEFT's own layer code."""

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..config import changes_base_weight
from ..runtime.distributed import gather_from_all, shared_random_numbers
from ..runtime.offloading import onloaded
from .checks import require_not_offloaded
from .layer_state import layer_states
from .lora_layers import layers_rebuilt_together
from .pending_config import lora_config_of
from .removal import remove_adapter, require_removable


@dataclass(frozen=True)
class Factors:
    """Given values for a LoRA layer, in the shapes of PEFT's weights.

    Attributes:
        a: A: r × d_in for linear layers, r × C_in × kernel for convolutions, r × ids for embeddings.
        b: B: d_out × r, and so on; `None` for zero.
        bias: The bias of B with `lora_bias` (d_out).
    """

    a: Tensor
    b: Tensor | None = None
    bias: Tensor | None = None


def resize_adapter(
    model: nn.Module,
    layers: Mapping[str, LoraLayer],
    adapter_name: str,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    new_config: LoraConfig,
    factors: Mapping[str, Sequence[Factors]] | None = None,
) -> None:
    """Give every LoRA layer of an adapter its rank and new weights; then adopt the new config.

    `factors` has A and B of some layers, one `Factors` for each layer that PEFT rebuilds together: two for an
    attention, otherwise one. Other layers get the initialization of `new_config`. A layer of rank 0 loses the adapter.
    All layers are rebuilt before any change is final, so a failure leaves the adapter as it was.

    Raises:
        ValueError: If a rank is 0 and PEFT could not load the rest, PEFT refuses the initialization for a layer, or
            given factors have the wrong shape, are for other layers, or do not fit the config.
        TypeError: If PEFT cannot initialize a layer from a weight of its dtype.
        RuntimeError: If a rebuilt layer does not have the requested rank or scaling.
    """
    removed = {name: layer for name, layer in layers.items() if ranks[name] == 0}
    kept = {name: layer for name, layer in layers.items() if name not in removed}
    if removed:
        require_removable(model, adapter_name, removed, kept, new_config)
    require_not_offloaded(kept, new_config.init_lora_weights)
    _require_usable(factors or {}, kept, new_config)
    states = {name: layer_states(layer, adapter_name, new_config.init_lora_weights) for name, layer in kept.items()}
    all_states = [state for states_of_layer in states.values() for state in states_of_layer]

    def rebuild() -> None:
        for name, layer in kept.items():
            given = (factors or {}).get(name, ())
            resize_layer(name, layer, adapter_name, ranks[name], alphas[name], new_config, given)
            for state in states[name]:
                state.carry_over()
                _verify(name, state.layer, adapter_name, ranks[name], alphas[name], new_config)

    try:
        with shared_random_numbers(*model.parameters()):
            gather_from_all(rebuild)
    except BaseException:
        for state in all_states:
            state.restore()
        raise
    for state in all_states:
        state.keep_parameters()
    if removed:
        remove_adapter(model, removed, adapter_name, new_config.bias)
    torch.clear_autocast_cache()  # an autocast around the call keeps casts of the weights before
    _adopt(model, adapter_name, new_config)


def require_same_ranks(ranks: Mapping[str, int], what: str) -> None:
    """Raise `ValueError` unless all processes have the same ranks; `what` to pass to every process is the way out."""
    for process, others in enumerate(gather_from_all(lambda: ranks)):
        if others != ranks:
            name = min(name for name, _ in set(others.items()) ^ set(ranks.items()))
            raise ValueError(
                f"Process {process} would give layer {name!r} rank {others.get(name)}, this one {ranks.get(name)}: "
                f"pass {what} to every process."
            )


def _adopt(model: Any, adapter_name: str, new_config: LoraConfig) -> None:
    """Make `new_config` the adapter's config, in place, because the model and its tuner share the object."""
    config = lora_config_of(model, adapter_name)
    for name, other in model.peft_config.items():
        if other is config and name != adapter_name:  # TRL's DPOTrainer adds its reference in this way
            model.peft_config[name] = copy.copy(config)
    config.__dict__.update(new_config.__dict__)


def _require_usable(factors: Mapping[str, Sequence[Factors]], kept: Iterable[str], config: LoraConfig) -> None:
    """Refuse factors that PEFT's layers would not use as they are given."""
    unknown = sorted(set(factors).difference(kept))
    if unknown:
        raise ValueError(f"Factors are given for {unknown[0]!r}, which does not keep an adapter: remove them.")
    with_b = [given for of_layer in factors.values() for given in of_layer if given.b is not None]
    if not with_b:
        return
    without_bias = config.lora_bias and any(given.bias is None for given in with_b)
    if config.use_dora or without_bias or changes_base_weight(config.init_lora_weights):
        raise ValueError(
            "A given B cannot be combined with use_dora, PiSSA or OLoRA, or without its bias with lora_bias: the "
            "magnitude, the base weight or the bias would not belong to it. Use a config without them."
        )


def resize_layer(
    name: str,
    layer: Any,
    adapter_name: str,
    rank: int,
    alpha: float,
    config: LoraConfig,
    factors: Sequence[Factors] = (),
) -> None:
    """Rebuild the adapter of one LoRA layer at a rank, with these factors or with the initialization of `config`.

    Raises `ValueError` if the factors do not have the shapes of PEFT's weights at this rank.
    """
    if factors:
        config = copy.copy(config)
        # PEFT's name for "A comes later" exists for linear layers, where it saves drawing A.
        is_linear = isinstance(dict(layer.lora_A).get(adapter_name), nn.Linear)
        config.init_lora_weights = "eva" if is_linear else True
    # PEFT creates the adapter on the device of the base weight.
    with onloaded(layer.get_base_layer()):
        layer.update_layer(adapter_name, rank, lora_alpha=alpha, **_update_arguments(layer, config))
    if factors:
        for part, given in zip(layers_rebuilt_together(layer), factors, strict=True):
            _write_factor(name, part, "A", adapter_name, given.a)
            _write_factor(name, part, "B", adapter_name, given.b)
            if given.bias is not None:
                part.lora_B[adapter_name].bias.data = given.bias.clone()


def _update_arguments(layer: LoraLayer, config: LoraConfig) -> dict[str, Any]:
    """`update_layer` takes the config from PEFT 0.19 on, and before that those of its fields that it needs."""
    functions = (vars(owner)["update_layer"] for owner in type(layer).__mro__ if "update_layer" in vars(owner))
    # `update_layer` of nn.MultiheadAttention only passes on its arguments.
    parameters = next(parameters for parameters in map(_parameter_names, functions) if "r" in parameters)
    if "config" in parameters:
        return {"config": config}
    own = ("self", "adapter_name", "r", "lora_alpha", "kwargs")
    return {name: getattr(config, name) for name in parameters if name not in own and hasattr(config, name)}


@functools.cache
def _parameter_names(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _write_factor(name: str, layer: Any, letter: str, adapter_name: str, value: Tensor | None) -> None:
    """Write a factor, or zeros for `None`."""
    modules, parameters = getattr(layer, f"lora_{letter}"), getattr(layer, f"lora_embedding_{letter}")
    weight = modules[adapter_name].weight if adapter_name in modules else parameters[adapter_name]
    if value is None:
        weight.data.zero_()
        return
    if weight.shape != value.shape:
        raise ValueError(
            f"{letter} of layer {name!r} has shape {tuple(weight.shape)} at this rank, but the given {letter} has "
            f"shape {tuple(value.shape)}: pass factors in the shapes of PEFT's weights."
        )
    # The dtype stays: PEFT has made the weight in that of the base weight, which may be coarser than the adapter's.
    weight.data = value.detach().to(device=weight.device, copy=True).contiguous()


def _verify(name: str, layer: LoraLayer, adapter_name: str, rank: int, alpha: float, config: LoraConfig) -> None:
    scaling = alpha / (rank**0.5 if config.use_rslora else rank)
    found = (layer.r[adapter_name], layer.scaling[adapter_name])
    if found[0] != rank or not math.isclose(found[1], scaling, rel_tol=1e-5):
        raise RuntimeError(
            f"PEFT built layer {name!r} with rank {found[0]} and scaling {found[1]}, not {rank} and {scaling}. Please "
            "report this together with the config."
        )
    for factor in (factors[adapter_name] for factors in (layer.lora_A, layer.lora_B) if adapter_name in factors):
        if isinstance(factor, nn.Linear) and factor.weight.shape != (factor.out_features, factor.in_features):
            raise RuntimeError(
                f"PEFT gave layer {name!r} weights of a wrong shape: it does not support "
                f"init_lora_weights={config.init_lora_weights!r} for {type(layer.get_base_layer()).__name__}. "
                "Use another initialization."
            )
