"""Installation of `init_lora_weights="fim"` into PEFT.

`install` gives `LoraConfig` the field `fim_config`, and makes `LoraModel` watch the backward passes of an adapter that
awaits its ranks. PEFT's other methods behave as before.
"""

import dataclasses
import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import peft
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn

from ..config import FimConfig
from ..runtime.offloading import is_offloaded
from .checks import require_resizable_form
from .layer_state import layer_states
from .lora_layers import adapter_layers
from .pending_config import awaits_ranks, with_final_init, with_init
from .resize import resize_layer
from .targets import convert_targets
from .watching import watch

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
    extended = dataclasses.make_dataclass(
        "LoraConfig", [("fim_config", "FimConfig | None", field)], bases=(LoraConfig,)
    )
    LoraConfig.__init__ = extended.__init__  # type: ignore[misc]
    LoraConfig.__eq__ = extended.__eq__
    LoraConfig.__repr__ = _wrap_repr(LoraConfig.__repr__)
    LoraConfig.__post_init__ = _wrap_post_init(LoraConfig.__post_init__)
    LoraConfig.to_dict = _wrap_to_dict(LoraConfig.to_dict)
    LoraConfig.__dataclass_fields__ = extended.__dataclass_fields__  # type: ignore[attr-defined]
    LoraConfig.__annotations__["fim_config"] = "FimConfig | None"
    LoraConfig.fim_config = None


def _wrap_repr(plain_repr: Callable[[LoraConfig], str]) -> Callable[[LoraConfig], str]:
    def __repr__(self: LoraConfig) -> str:
        text = plain_repr(self)
        return text if self.fim_config is None else f"{text[:-1]}, fim_config={self.fim_config!r})"

    return __repr__


def _wrap_post_init(plain_post_init: Callable[[LoraConfig], None]) -> Callable[[LoraConfig], None]:
    def __post_init__(self: LoraConfig) -> None:
        if "fim_config" not in self.__dataclass_fields__:  # a derived config, such as AdaLoraConfig
            plain_post_init(self)
            return
        if isinstance(self.fim_config, dict):
            self.fim_config = FimConfig(**self.fim_config)
        if self.fim_config is not None and not isinstance(self.fim_config, FimConfig):
            raise TypeError(f"`fim_config` must be a FimConfig, a dict or None, got {self.fim_config!r}.")
        if awaits_ranks(self):
            self.fim_config = self.fim_config or FimConfig()
        with with_final_init(self):
            plain_post_init(self)
        if self.fim_config is not None and not awaits_ranks(self):
            warnings.warn(
                "`fim_config` specified but will be ignored when `init_lora_weights` is not 'fim'.", stacklevel=3
            )

    return __post_init__


def _wrap_to_dict(plain_to_dict: Callable[[LoraConfig], dict[str, Any]]) -> Callable[[LoraConfig], dict[str, Any]]:
    def to_dict(self: LoraConfig) -> dict[str, Any]:
        # An adapter that still awaits its ranks is saved as plain LoRA.
        with with_init(self, True):
            content = plain_to_dict(self)
        content.pop("fim_config", None)
        if awaits_ranks(self):
            content["eva_config"] = None  # PEFT would warn about it whenever the config is read
        return content

    return to_dict


def _wrap_inject_adapter(inject_adapter: Callable[..., None]) -> Callable[..., None]:
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

    inject_and_watch.__doc__ = inject_adapter.__doc__
    return inject_and_watch


def _put_on_devices(model: nn.Module, adapter_name: str, config: LoraConfig) -> None:
    """Rebuild the adapters of offloaded layers, which PEFT puts on the meta device, without values."""
    for name, layer in adapter_layers(model, adapter_name).items():
        if not is_offloaded(layer.get_base_layer()):
            continue
        states = layer_states(layer, adapter_name, True)
        resize_layer(name, layer, adapter_name, layer.r[adapter_name], layer.lora_alpha[adapter_name], config)
        for state in states:
            state.carry_over()
