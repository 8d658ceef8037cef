"""Checks that refuse adapters and models which cannot be calibrated or resized, before anything is changed.

Each raises `ValueError` with the name of a layer or of a field of the config, and with a fix.
"""

from collections.abc import Mapping

from peft import LoraConfig, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..config import changes_base_weight
from ..runtime.offloading import is_offloaded
from ..runtime.wrappers import any_sharded, strip_wrapper_names, uses_fsdp1
from .factors import weights_of
from .layer_state import own_modules_and_parameters
from .lora_layers import layers_rebuilt_together, name_in_base_model
from .pending_config import awaits_ranks, final_initialization

# Fields of `LoraConfig` with which a layer cannot get another rank after it is built, and why. Older versions of PEFT
# do not have all of them.
NOT_RESIZABLE = {
    "kasa_config": (
        "KaSA cuts the smallest r singular values off the base weights as soon as the adapter is created, and would "
        "cut off more of them for another rank. Call `get_fim_scores` on the plain model, and create the adapter with "
        "the config that `RankAllocation.from_scores(scores, config).to_lora_config(config)` returns"
    ),
    "use_bdlora": (
        "the blocks of BD-LoRA have to divide every rank, and PEFT chooses them by a name that is no longer "
        "available after a layer is built. Leave it out"
    ),
    "arrow_config": "a router of Arrow mixes other adapters, and its own A and B are never used. Leave it out",
}


def require_resizable(model: nn.Module, layers: Mapping[str, LoraLayer], config: LoraConfig) -> None:
    """Refuse an adapter whose ranks cannot be changed."""
    require_resizable_form(config)
    base_layers = {name: layer.get_base_layer() for name, layer in layers.items()}
    require_initialization(base_layers, final_initialization(config))
    require_unmerged(model)
    require_unsharded(model, layers)


def require_untrained(layers: Mapping[str, LoraLayer], adapter_name: str) -> None:
    """Refuse an adapter whose weights an allocation would lose: PEFT creates it with A or B zero in every layer.

    Weights on the meta device, which have no values, are not looked at.
    """
    trained = [
        name
        for name, layer in layers.items()
        if not all(weights.is_zero() for weights in weights_of(layer, adapter_name))
    ]
    if trained:
        raise ValueError(
            f"Adapter {adapter_name!r} was trained, or its weights were loaded: neither A nor B of {len(trained)} of "
            f"{len(layers)} layers is zero, such as of {trained[0]!r}. An allocation starts the adapter from scratch. "
            "Allocate before the training, shrink the trained adapter with `compress_lora`, or pass "
            "`discard_weights=True` to `initialize_lora_fim_ranks` to lose these weights."
        )


def require_compressible(
    model: nn.Module, layers: Mapping[str, LoraLayer], config: LoraConfig, adapter_name: str
) -> None:
    """Refuse a trained adapter that does not add `s · B A` to its base weights, or whose weights cannot be read."""
    if config.peft_type != PeftType.LORA:
        raise ValueError(
            f"Adapter {adapter_name!r} is a {type(config).__name__} adapter, which is not plain LoRA: convert it, for "
            "example with `peft.convert_to_lora` (PEFT 0.19 or newer), and compress that."
        )
    if awaits_ranks(config):
        raise ValueError(
            f"Adapter {adapter_name!r} still awaits its ranks: call `initialize_lora_fim_ranks`, and train it first."
        )
    require_unmerged(model)
    if uses_fsdp1(model):
        raise ValueError("FullyShardedDataParallel flattens the adapter's weights: use FSDP2 (`fully_shard`).")
    init = config.init_lora_weights
    if changes_base_weight(init):
        raise ValueError(
            f"The adapter was initialized with {init!r}, which changed the base weights by an adapter of the present "
            f"rank, beginning with layer {next(iter(layers))!r}. Save it as plain LoRA with save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...) of PEFT or `peft.save_as_lora`, load that, and compress it."
        )
    seen: dict[int, str] = {}
    for name, layer in layers.items():
        _require_plain_lora(name, layer, adapter_name)
        for weight in (weight for one in weights_of(layer, adapter_name) for weight in (one.a, one.b)):
            if weight.device.type == "meta":
                raise ValueError(
                    f"The adapter of layer {name!r} is offloaded, so its weights cannot be read: offload only the "
                    "base model, by `device_map`, and load the adapter with PEFT."
                )
            if seen.setdefault(id(weight), name) != name:
                _refuse_shared_adapter(seen[id(weight)], name)
    for tied in getattr(config, "target_modules_to_tie", None) or ():
        _refuse_shared_adapter("the input embedding", tied)


def _refuse_shared_adapter(first: str, second: str) -> None:
    raise ValueError(
        f"Layers {first!r} and {second!r} share the weights of their adapter (ensure_weight_tying), which cannot be "
        "truncated in two ways: train without it."
    )


def _require_plain_lora(name: str, layer: LoraLayer, adapter_name: str) -> None:
    if layer.scaling[adapter_name] == 0:
        raise ValueError(
            f"Layer {name!r} has scaling 0, so its adapter adds nothing: call `set_scale` with another value, or "
            "remove the layer from the adapter."
        )
    for part in layers_rebuilt_together(layer):
        variant = getattr(part, "lora_variant", {}).get(adapter_name)
        kind = "DoRA" if part.use_dora.get(adapter_name) else type(variant).__name__
        if variant is not None or part.use_dora.get(adapter_name):
            raise ValueError(
                f"Layer {name!r} has a variant of LoRA ({kind}), which does more than add B A to the weight. Convert "
                "it to plain LoRA first, for example with `peft.convert_to_lora` (PEFT 0.19 or newer), and compress "
                "that."
            )


def require_active(layers: Mapping[str, LoraLayer], adapter_name: str) -> None:
    """Refuse an adapter that a forward pass would not use."""
    for name, layer in layers.items():
        if layer.disable_adapters or adapter_name not in layer.active_adapters:
            raise ValueError(
                f"Adapter {adapter_name!r} is not active in layer {name!r}: call `set_adapter({adapter_name!r})`, "
                "outside of `disable_adapter`."
            )


def require_resizable_form(config: LoraConfig, *, except_for: str = "") -> None:
    """Refuse the variants of LoRA in `NOT_RESIZABLE`."""
    for field, reason in NOT_RESIZABLE.items():
        if field != except_for and getattr(config, field, None) is not None:
            raise ValueError(f"{field} cannot be combined with init_lora_weights='fim': {reason}.")


def require_initialization(base_layers: Mapping[str, nn.Module], init_lora_weights: bool | str) -> None:
    """Refuse embeddings, which PEFT would silently initialize with its default; it refuses convolutions itself."""
    if not changes_base_weight(init_lora_weights) and init_lora_weights != "orthogonal":
        return
    for name, layer in base_layers.items():
        if isinstance(layer, nn.Embedding):
            raise ValueError(
                f"PEFT has no init_lora_weights={init_lora_weights!r} for layer {name!r}, an embedding: remove it "
                "from `target_modules`, or use another initialization."
            )


def require_unmerged(model: nn.Module) -> None:
    """Refuse merged adapters.

    A merged layer that gets a new A and B would keep the update by the old ones in its base weight for good. Disabling
    adapters makes PEFT take merged ones out of the base weight, and enabling them does not put them back.
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


def require_not_offloaded(layers: Mapping[str, LoraLayer], init_lora_weights: bool | str) -> None:
    """Refuse an initialization that changes offloaded base weights, because the change would be lost."""
    if not changes_base_weight(init_lora_weights):
        return
    for name, layer in layers.items():
        if is_offloaded(layer.get_base_layer()):
            raise ValueError(
                f"init_lora_weights={init_lora_weights!r} changes the base weight, but that of layer {name!r} is "
                "offloaded: load the model without offloading, or choose another initialization."
            )


BEFORE_SHARDING = (
    "Call `initialize_lora_fim_ranks` before the model is sharded. If the model is too large for that, call "
    "`get_fim_scores` on the sharded model without an adapter, and create it with the config that "
    "`RankAllocation.from_scores(scores, config).to_lora_config(config)` returns"
)


def require_unsharded(model: nn.Module, layers: Mapping[str, LoraLayer], way_out: str = BEFORE_SHARDING) -> None:
    """Refuse sharded adapters, because a sharded parameter cannot change its shape."""
    in_fsdp1 = uses_fsdp1(model)
    for name, layer in layers.items():
        if in_fsdp1 or any(
            any_sharded(own_modules_and_parameters(part)[1].values()) for part in layers_rebuilt_together(layer)
        ):
            raise ValueError(
                f"The adapter of layer {name!r} is sharded, and its rank can no longer change. {way_out}."
            )
