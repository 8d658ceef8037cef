"""Refusals: adapters and models that cannot be calibrated or resized, found before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..config import changes_base_weight
from ..runtime.offloading import is_offloaded
from ..runtime.wrappers import any_sharded, strip_wrapper_names, uses_fsdp1
from .layer_state import own_parts
from .lora_layers import name_in_base_model, rebuilt_together
from .pending_config import final_initialization

# Fields of `LoraConfig` with which a layer cannot get another rank after it is built, and why. Older versions of PEFT
# do not have all of them.
NOT_RESIZABLE = {
    "kasa_config": (
        "KaSA cuts the smallest r singular values off the base weights as soon as the adapter is created, and would "
        "cut off more of them for another rank. Call `get_fim_scores` on the plain model, and create the adapter with "
        "the config that `RankAllocation.from_scores(scores, config).to_lora_config(config)` returns"
    ),
    "use_bdlora": (
        "the blocks of BD-LoRA have to divide every rank, and PEFT chooses them by a name that a layer no longer "
        "knows after it is built. Leave it out"
    ),
    "arrow_config": "a router of Arrow mixes other adapters, and its own A and B are never used. Leave it out",
}


def require_resizable(model: nn.Module, layers: Mapping[str, LoraLayer], config: LoraConfig) -> None:
    """Refuse an adapter that cannot get other ranks.

    Raises:
        ValueError: If the config asks for a form of LoRA that cannot be resized, or for an initialization that PEFT
            does not have for a layer; if adapters are merged; or if the adapter's weights are sharded.
    """
    require_resizable_form(config)
    base_layers = {name: cast(Any, layer).get_base_layer() for name, layer in layers.items()}
    require_initialization(base_layers, final_initialization(config))
    require_unmerged(model)
    _require_unsharded(model, layers)


def require_resizable_form(config: LoraConfig, *, except_for: str = "") -> None:
    """Refuse the variants of LoRA in `NOT_RESIZABLE`."""
    for field, reason in NOT_RESIZABLE.items():
        if field != except_for and getattr(config, field, None) is not None:
            raise ValueError(f"{field} cannot be combined with init_lora_weights='fim': {reason}.")


def require_initialization(base_layers: Mapping[str, nn.Module], init_lora_weights: bool | str) -> None:
    """Refuse embeddings, which PEFT would silently initialize with its default; convolutions it refuses itself."""
    if not isinstance(init_lora_weights, str) or not init_lora_weights.startswith(("pissa", "olora", "orthogonal")):
        return
    embeddings = [name for name, layer in base_layers.items() if isinstance(layer, nn.Embedding)]
    if embeddings:
        raise ValueError(
            f"PEFT has no init_lora_weights={init_lora_weights!r} for layer {embeddings[0]!r}, an embedding: take it "
            "out of `target_modules`, or use another initialization."
        )


def require_unmerged(model: nn.Module) -> None:
    """Refuse merged adapters.

    A merged layer that gets a new A and B would keep the update by the old ones in its base weight for good. And
    where adapters are disabled, PEFT takes merged ones out of the base weight, and does not put them back.

    Raises:
        ValueError: If an adapter is merged. It names the adapters and a layer.
    """
    merged = {
        name_in_base_model(strip_wrapper_names(name)): module.merged_adapters
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and module.merged_adapters
    }
    if not merged:
        return
    adapters = sorted({adapter for adapters in merged.values() for adapter in adapters})
    others = f" and {len(merged) - 1} more" if len(merged) > 1 else ""
    raise ValueError(
        f"Adapters {adapters} are merged into the base weights of layer {next(iter(merged))!r}{others}. Merged layers "
        "can be neither calibrated nor resized: call `unmerge_adapter()` first."
    )


def _require_unsharded(model: nn.Module, layers: Mapping[str, LoraLayer]) -> None:
    """Refuse sharded adapters, whose parameters no wrapper allows to change their shape."""
    in_fsdp1 = uses_fsdp1(model)
    sharded = [
        name
        for name, layer in layers.items()
        if in_fsdp1 or any(any_sharded(own_parts(one)[1].values()) for one in rebuilt_together(layer))
    ]
    if not sharded:
        return
    raise ValueError(
        f"The adapter of layer {sharded[0]!r} is sharded, and its rank can no longer change. Call "
        "`initialize_lora_fim_ranks` before the model is sharded. If the model is too large for that, call "
        "`get_fim_scores` on the sharded model without adapter, and create the adapter with the config that "
        "`RankAllocation.from_scores(scores, config).to_lora_config(config)` returns."
    )


def require_weights_at_hand(layers: Mapping[str, LoraLayer], init_lora_weights: bool | str) -> None:
    """Refuse an initialization that changes offloaded base weights, because the change would be lost."""
    if not changes_base_weight(init_lora_weights):
        return
    offloaded = [name for name, layer in layers.items() if is_offloaded(cast(Any, layer).get_base_layer())]
    if offloaded:
        raise ValueError(
            f"init_lora_weights={init_lora_weights!r} changes the base weight, but that of layer {offloaded[0]!r} is "
            "offloaded: load the model without offloading, or choose another initialization."
        )
