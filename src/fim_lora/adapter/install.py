"""Installation of `init_lora_weights="fim"` into PEFT.

`install` gives `LoraConfig` the field `fim_config`, and makes `LoraModel` watch the backward passes of an adapter that
awaits its ranks, until it gets them or is removed. PEFT's other methods behave as before.
"""

import copy
import dataclasses
import functools
import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import peft
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.mixed import MixedModel
from torch import nn

from ..config import FimConfig
from ..runtime.offloading import is_offloaded
from ..runtime.user_warnings import warn_user
from .checks import require_resizable_form
from .layer_state import layer_states
from .lora_layers import adapter_layers
from .missing_weights import wrap_loading
from .pending_config import awaits_ranks, with_final_init, with_init
from .resize import resize_layer
from .targets import convert_targets
from .watching import stop_watching_all, stop_watching_layer, watch

_MODULE = "peft.tuners.lora.fim"


def install(public: Mapping[str, Any]) -> None:
    """Install `"fim"`, and make the names in `public` importable from `peft`, `peft.tuners.lora` and its module `fim`.

    Calling it again changes nothing. Raises `ImportError`, with nothing changed, if PEFT has its own `fim`.
    """
    fields = LoraConfig.__dataclass_fields__
    if "fim_config" in fields and fields["fim_config"].metadata.get("provider") == "fim_lora":
        return
    if "fim_config" in fields or _MODULE in sys.modules or importlib.util.find_spec(_MODULE) is not None:
        raise ImportError(
            f"PEFT {peft.__version__} has its own `fim` initialization. Use that one and do not import fim_lora, or "
            "install a PEFT version that fim-lora supports. Nothing was changed."
        )
    _extend_lora_config()
    LoraModel.inject_adapter = _wrap_inject_adapter(LoraModel.inject_adapter)
    MixedModel.inject_adapter = _wrap_inject_mixed_adapter(MixedModel.inject_adapter)
    LoraModel.unload = _wrap_unload(LoraModel.unload)
    LoraModel.merge_and_unload = _wrap_unload(LoraModel.merge_and_unload)
    LoraLayer.delete_adapter = _wrap_delete_adapter(LoraLayer.delete_adapter)
    wrap_loading()

    module = ModuleType(_MODULE, "FIM ranks for LoRA; provided by fim_lora.")
    module.__dict__.update(public)
    sys.modules[_MODULE] = module
    peft.tuners.lora.fim = module
    for package in (peft, peft.tuners.lora):
        package.__dict__.update(public)


def _extend_lora_config() -> None:
    """Add the field `fim_config`, last and by keyword only, to the existing class.

    The class must stay the same object, because it may have been imported already. So a derived dataclass is made,
    and the methods that Python generated for it are moved over.
    """
    field: Any = dataclasses.field(
        default=None,
        kw_only=True,
        metadata={
            "help": (
                "The configuration of FIM ranks. If this is not None, ranks are allocated by the empirical Fisher "
                "information. Also set `init_lora_weights='fim'` in this case."
            ),
            "provider": "fim_lora",
        },
    )
    # Not a string, which `typing.get_type_hints` would look up in PEFT's module.
    annotation: Any = FimConfig | None
    extended = dataclasses.make_dataclass("LoraConfig", [("fim_config", annotation, field)], bases=(LoraConfig,))
    LoraConfig.__init__ = extended.__init__  # type: ignore[misc]
    LoraConfig.__eq__ = extended.__eq__
    LoraConfig.__repr__ = _wrap_repr(LoraConfig.__repr__)
    LoraConfig.__post_init__ = _wrap_post_init(LoraConfig.__post_init__)
    LoraConfig.to_dict = _wrap_to_dict(LoraConfig.to_dict)
    LoraConfig.save_pretrained = _wrap_save_pretrained(LoraConfig.save_pretrained)
    LoraConfig.__dataclass_fields__ = extended.__dataclass_fields__  # type: ignore[attr-defined]
    LoraConfig.__annotations__["fim_config"] = annotation
    LoraConfig.fim_config = None


def _wrap_repr(plain_repr: Callable[[LoraConfig], str]) -> Callable[[LoraConfig], str]:
    def __repr__(self: LoraConfig) -> str:
        text = plain_repr(self)
        return text if self.fim_config is None else f"{text[:-1]}, fim_config={self.fim_config!r})"

    return __repr__


def _wrap_post_init(plain_post_init: Callable[[LoraConfig], None]) -> Callable[[LoraConfig], None]:
    def __post_init__(self: LoraConfig) -> None:
        if "fim_config" not in self.__dataclass_fields__:  # a derived config, such as AdaLoraConfig
            _refuse_derived_config(self)
            plain_post_init(self)
            return
        if isinstance(self.fim_config, dict):
            self.fim_config = FimConfig(**self.fim_config)
        if self.fim_config is not None and not isinstance(self.fim_config, FimConfig):
            raise TypeError(f"`fim_config` must be a FimConfig, a dict or None, got {self.fim_config!r}.")
        if awaits_ranks(self):
            self.fim_config = self.fim_config or FimConfig()
            _require_possible_ranks(self, self.fim_config)
        with with_final_init(self):
            plain_post_init(self)
        if self.fim_config is not None and not awaits_ranks(self):
            warnings.warn(
                "`fim_config` specified but will be ignored when `init_lora_weights` is not 'fim'.", stacklevel=3
            )

    return __post_init__


def _require_possible_ranks(config: LoraConfig, fim_config: FimConfig) -> None:
    """Refuse base ranks beyond the bounds now, and not after a calibration."""
    base_ranks = {"r": config.r} | {
        f"rank_pattern[{key!r}]": rank for key, rank in (config.rank_pattern or {}).items()
    }
    for name, rank in base_ranks.items():
        if fim_config.r_max is not None and rank > fim_config.r_max:
            raise ValueError(
                f"{name} is {rank}, above r_max={fim_config.r_max} of `fim_config`: raise r_max or lower it."
            )
        if 0 < rank < fim_config.r_min:
            raise ValueError(
                f"{name} is {rank}, below r_min={fim_config.r_min} of `fim_config`: lower r_min or raise it."
            )


def _refuse_derived_config(config: LoraConfig) -> None:
    if config.init_lora_weights == "fim":
        raise ValueError(
            f'{type(config).__name__} has no init_lora_weights="fim": its method chooses ranks itself, or the '
            "class was defined before fim_lora was imported. Use LoraConfig, or another initialization."
        )


def _wrap_to_dict(plain_to_dict: Callable[[LoraConfig], dict[str, Any]]) -> Callable[[LoraConfig], dict[str, Any]]:
    @functools.wraps(plain_to_dict)
    def to_dict(self: LoraConfig) -> dict[str, Any]:
        content = plain_to_dict(self)
        if content.get("fim_config") is None:
            content.pop("fim_config", None)  # a field that stock PEFT does not have
        return content

    return to_dict


def _wrap_save_pretrained(plain_save_pretrained: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(plain_save_pretrained)
    def save_pretrained(self: LoraConfig, *args: Any, **kwargs: Any) -> None:
        written = copy.copy(self)
        if "fim_config" in self.__dataclass_fields__:
            written.fim_config = None
        if awaits_ranks(self):
            warn_user(
                "This adapter never got its FIM ranks, and is saved as a plain LoRA adapter with its base ranks: call "
                "`initialize_lora_fim_ranks` before the training."
            )
            written.init_lora_weights = True
            written.eva_config = None  # PEFT would warn about it whenever the config is read
        plain_save_pretrained(written, *args, **kwargs)

    return save_pretrained


def _wrap_inject_adapter(inject_adapter: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(inject_adapter)
    def inject_and_watch(self: LoraModel, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        if not awaits_ranks(config):
            inject_adapter(self, model, adapter_name, *args, **kwargs)
            return
        # Layers that cannot be resized, and layers without a defined eFIM, raise here, before anything is changed.
        require_resizable_form(config)
        _, converted = convert_targets(model, config)
        with with_init(config, True):
            inject_adapter(self, model, adapter_name, *args, **kwargs)
            _put_on_devices(model, adapter_name, config)
        watch(self, model, adapter_name, config, converted)

    return inject_and_watch


def _wrap_inject_mixed_adapter(inject_adapter: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(inject_adapter)
    def inject(self: MixedModel, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        if isinstance(config, LoraConfig) and awaits_ranks(config):
            raise ValueError(
                f'Adapter {adapter_name!r} has init_lora_weights="fim", which get_peft_model(..., mixed=True) cannot '
                "create: leave out mixed=True, or call `get_fim_scores` on the plain model, and pass the config that "
                "`RankAllocation.from_scores(scores, config).to_lora_config(config)` returns."
            )
        inject_adapter(self, model, adapter_name, *args, **kwargs)

    return inject


def _wrap_unload(unload: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Let the plain model that `unload` and `merge_and_unload` return have no hooks."""

    @functools.wraps(unload)
    def unload_and_stop(self: LoraModel, *args: Any, **kwargs: Any) -> nn.Module:
        model = unload(self, *args, **kwargs)
        stop_watching_all(model)
        return model

    return unload_and_stop


def _wrap_delete_adapter(delete_adapter: Callable[..., None]) -> Callable[..., None]:
    """Remove the hooks of an adapter with its first layer: PEFT, transformers and diffusers delete layer by layer."""

    @functools.wraps(delete_adapter)
    def delete_and_stop(self: LoraLayer, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        delete_adapter(self, adapter_name, *args, **kwargs)
        stop_watching_layer(self, adapter_name)

    return delete_and_stop


def _put_on_devices(model: nn.Module, adapter_name: str, config: LoraConfig) -> None:
    """Rebuild the adapters of offloaded layers, which PEFT puts on the meta device, without values."""
    for name, layer in adapter_layers(model, adapter_name).items():
        if not is_offloaded(layer.get_base_layer()):
            continue
        states = layer_states(layer, adapter_name, True)
        resize_layer(name, layer, adapter_name, layer.r[adapter_name], layer.lora_alpha[adapter_name], config)
        for state in states:
            state.carry_over()
