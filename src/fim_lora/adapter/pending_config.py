"""The config of an adapter that awaits its ranks, `init_lora_weights="fim"`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from peft import EvaConfig, LoraConfig
from torch import nn

from ..runtime.wrappers import unwrap_engine


def awaits_ranks(config: LoraConfig) -> bool:
    """Whether a config has `init_lora_weights="fim"`, and its class has a `fim_config`."""
    return config.init_lora_weights == "fim" and "fim_config" in config.__dataclass_fields__


def final_initialization(config: LoraConfig) -> bool | str:
    """`init_lora_weights` after the allocation. `True` for directions from EVA, which are then in the weights."""
    if not awaits_ranks(config):
        return config.init_lora_weights
    chosen = config.fim_config.init_lora_weights
    return True if chosen == "eva" else chosen


@contextmanager
def with_final_init(config: LoraConfig) -> Iterator[None]:
    """Put the final initialization into the config inside the block, so that PEFT validates it now."""
    if not awaits_ranks(config):
        yield
        return
    chosen = config.fim_config.init_lora_weights
    lacks_eva_config = chosen == "eva" and config.eva_config is None
    if lacks_eva_config:
        config.eva_config = EvaConfig()  # otherwise PEFT warns that it uses this one
    try:
        with with_init(config, chosen):
            yield
    finally:
        if lacks_eva_config:
            config.eva_config = None


@contextmanager
def with_init(config: LoraConfig, init_lora_weights: bool | str) -> Iterator[None]:
    """Replace `"fim"` inside the block by an initialization that stock PEFT knows."""
    if not awaits_ranks(config):
        yield
        return
    config.init_lora_weights = init_lora_weights
    try:
        yield
    finally:
        config.init_lora_weights = "fim"


def awaiting_config(model: nn.Module, adapter_name: str) -> LoraConfig:
    """The config of an adapter of a model; raises `ValueError` if there is none, or it does not await its ranks."""
    config = lora_config_of(model, adapter_name)
    if not awaits_ranks(config):
        raise ValueError(
            f"Adapter {adapter_name!r} does not await FIM allocation: it has init_lora_weights="
            f"{config.init_lora_weights!r}, as adapters also have after an allocation. Create it with "
            'LoraConfig(init_lora_weights="fim", fim_config=FimConfig(...)).'
        )
    return config


def require_own_config(model: nn.Module, adapter_name: str, config: LoraConfig) -> None:
    """Refuse a config object that another adapter shares: it would state wrong ranks for the other adapter."""
    for name, other in cast(Any, model).peft_config.items():
        if other is config and name != adapter_name:
            raise ValueError(
                f"Adapter {name!r} was made from the same config object as {adapter_name!r}, which will hold the "
                f"ranks of {adapter_name!r} only: add {name!r} after the allocation, or with a copy of the config. "
                "TRL's DPOTrainer does this to a PeftModel: give it the plain model and the config as `peft_config`."
            )


def lora_config_of(model: nn.Module, adapter_name: str) -> LoraConfig:
    """The LoRA config of an adapter; raises `ValueError` if the model is wrapped or has no such LoRA adapter."""
    configs = getattr(model, "peft_config", None)
    if configs is None and unwrap_engine(model) is not model:
        raise ValueError(
            f"The model is wrapped in {type(model).__name__}, which keeps using the current parameters: "
            "pass `model.module` (Accelerate: `accelerator.unwrap_model(model)`), and wrap it again afterward."
        )
    if configs is None:
        raise ValueError("The model has no adapter: call `get_peft_model(model, config)` first.")
    if adapter_name not in configs:
        raise ValueError(f"The model has no adapter {adapter_name!r}; it has {sorted(configs)}.")
    config = configs[adapter_name]
    if not isinstance(config, LoraConfig):
        raise ValueError(f"Adapter {adapter_name!r} is a {type(config).__name__} adapter, not a LoRA adapter.")
    return config
