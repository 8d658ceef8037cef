"""Everything that touches PEFT's classes.

`install` teaches `LoraConfig` the field `fim_config` and the initialisation `"fim"`, and has `LoraModel` watch the
backward passes of an adapter that awaits its ranks. The rest of the file reads and resizes LoRA layers through
their own code.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, cast

import peft
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .config import FimConfig
from .estimator import FisherEstimator
from .gradient_norms import layer_type
from .rank_allocation import RankAllocation

_MODULE = "peft.tuners.lora.fim"
_PREFIX = "base_model.model."
# Attribute of the base model: adapter name to estimator. It is a plain attribute, so that copies and pickles of the
# model take it along, and it is in no state dict.
_ESTIMATORS = "_fim_estimators"


# --- Teaching PEFT ---


def install(public: Mapping[str, Any]) -> None:
    """Teach PEFT `"fim"`. Calling it again changes nothing.

    Args:
        public: Names to be importable from `peft`, `peft.tuners.lora` and `peft.tuners.lora.fim`.

    Raises:
        ImportError: If PEFT has a `fim` initialisation of its own; nothing is changed then.
    """
    fields = LoraConfig.__dataclass_fields__
    ours = "fim_config" in fields and fields["fim_config"].metadata.get("provider") == "fim_lora"
    if ours:
        return
    if "fim_config" in fields or _MODULE in sys.modules or importlib.util.find_spec(_MODULE) is not None:
        raise ImportError(
            f"PEFT {peft.__version__} ships a `fim` initialisation of its own. Use that one and do not import "
            "fim_lora, or install a PEFT version that fim-lora supports. Nothing was changed."
        )
    _extend_lora_config()
    LoraModel.inject_adapter = _watching(LoraModel.inject_adapter)

    module = ModuleType(_MODULE, "FIM ranks for LoRA; provided by fim_lora.")
    module.__dict__.update(public)
    sys.modules[_MODULE] = module
    peft.tuners.lora.fim = module
    for package in (peft, peft.tuners.lora):
        package.__dict__.update(public)


def _extend_lora_config() -> None:
    """Add the field `fim_config`, last and by keyword only, to the existing class.

    The class must stay the same object, because it may have been imported already. So a derived dataclass is made,
    and what Python generated for it is moved over.
    """
    field = dataclasses.field(
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
    plain_repr, plain_post_init, plain_to_dict = (
        LoraConfig.__repr__,
        LoraConfig.__post_init__,
        LoraConfig.to_dict,
    )

    def __repr__(self: LoraConfig) -> str:
        text = plain_repr(self)
        return text if self.fim_config is None else f"{text[:-1]}, fim_config={self.fim_config!r})"

    def __post_init__(self: LoraConfig) -> None:
        if "fim_config" not in self.__dataclass_fields__:  # a derived config, such as AdaLoraConfig
            plain_post_init(self)
            return
        if isinstance(self.fim_config, dict):
            self.fim_config = FimConfig(**self.fim_config)
        if self.fim_config is not None and not isinstance(self.fim_config, FimConfig):
            raise TypeError(f"`fim_config` must be a FimConfig, a dict or None, got {self.fim_config!r}.")
        with _presented_as_plain_lora(self):
            plain_post_init(self)
        if awaits_ranks(self):
            self.fim_config = self.fim_config or FimConfig()
        elif self.fim_config is not None:
            warnings.warn(
                "`fim_config` specified but will be ignored when `init_lora_weights` is not 'fim'.",
                stacklevel=3,
            )

    def to_dict(self: LoraConfig) -> dict[str, Any]:
        with _presented_as_plain_lora(self):
            content = plain_to_dict(self)
        content.pop("fim_config", None)
        return content

    LoraConfig.__init__ = extended.__init__  # type: ignore[misc]
    LoraConfig.__eq__ = extended.__eq__
    LoraConfig.__repr__ = __repr__
    LoraConfig.__post_init__ = __post_init__
    LoraConfig.to_dict = to_dict
    LoraConfig.__dataclass_fields__ = extended.__dataclass_fields__  # type: ignore[attr-defined]
    LoraConfig.__annotations__["fim_config"] = "FimConfig | None"
    LoraConfig.fim_config = None


def awaits_ranks(config: LoraConfig) -> bool:
    """Whether a config is that of an adapter that still waits for its ranks.

    Args:
        config: A LoRA config.

    Returns:
        Whether it has `init_lora_weights="fim"` and its class has a `fim_config`.
    """
    return config.init_lora_weights == "fim" and "fim_config" in config.__dataclass_fields__


@contextmanager
def _presented_as_plain_lora(config: LoraConfig) -> Iterator[None]:
    """Show PEFT, and whoever reads a written config, what an adapter without its ranks is: plain LoRA."""
    if not awaits_ranks(config):
        yield
        return
    config.init_lora_weights = True
    try:
        yield
    finally:
        config.init_lora_weights = "fim"


def _watching(inject_adapter: Callable[..., None]) -> Callable[..., None]:
    def watching_inject_adapter(
        self: LoraModel, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        config = self.peft_config[adapter_name]
        if not awaits_ranks(config):
            inject_adapter(self, model, adapter_name, *args, **kwargs)
            return
        # Before anything is changed: a layer without a defined eFIM raises here.
        for name, layer in resolve_targets(model, config).items():
            layer_type(name, layer)
        with _presented_as_plain_lora(config):
            inject_adapter(self, model, adapter_name, *args, **kwargs)
        if not config.inference_mode:
            _watch(self, model, adapter_name, config.fim_config)

    watching_inject_adapter.__doc__ = inject_adapter.__doc__
    return watching_inject_adapter


def _watch(tuner: LoraModel, model: nn.Module, adapter_name: str, fim_config: FimConfig) -> None:
    base_layers = {name: layer.get_base_layer() for name, layer in adapter_layers(model, adapter_name).items()}
    estimator = FisherEstimator(base_layers, fim_config.fim_calibration_batches)
    forget_estimator(model, adapter_name)  # of an adapter of that name that was unloaded
    # Some PeftModels call the tuner, and it the `forward` of the model; others call the model itself.
    estimator.attach(tuner, model)
    model.__dict__.setdefault(_ESTIMATORS, {})[adapter_name] = estimator


# --- Reading a model ---


def name_in_base_model(name: str) -> str:
    """A layer's name without the prefix that `PeftModel` adds.

    Args:
        name: Name with or without `base_model.model.`.

    Returns:
        Name as in the base model.
    """
    return name.removeprefix(_PREFIX)


def adapter_layers(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """The LoRA layers of an adapter.

    Args:
        model: A `PeftModel`, or a model with injected adapters.
        adapter_name: The adapter.

    Returns:
        Name, as in the base model, to LoRA layer.

    Raises:
        ValueError: If the model has no LoRA layer of that adapter.
    """
    layers = {
        name_in_base_model(name): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.r
    }
    if not layers:
        raise ValueError(f"The model has no LoRA layer of an adapter {adapter_name!r}.")
    return layers


def resolve_targets(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """The layers that PEFT would adapt, found by PEFT's own injection into a skeleton of the model.

    The skeleton shares every tensor with the model and has modules of its own; the adapters in it are on the meta
    device. Nothing in the model changes.

    Args:
        model: The model; adapters it has already are looked through.
        config: The LoRA config.

    Returns:
        Name, as in the base model, to base layer.

    Raises:
        ValueError: If PEFT finds nothing to adapt, or the config is not a LoRA config.
    """
    if not isinstance(config, LoraConfig):
        raise ValueError(f"peft_config must be a LoraConfig, got {type(config).__name__}.")
    config = copy.deepcopy(config)
    config.init_lora_weights = True
    config.use_dora = False
    config.layer_replication = None  # would change the config of the model, which the skeleton shares
    skeleton = _skeleton(model, {})
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with warnings.catch_warnings():
            # They come again, once, when the adapter is created.
            warnings.simplefilter("ignore")
            LoraModel(skeleton, {"default": config}, "default", low_cpu_mem_usage=True)
    finally:
        for parameter, needed in requires_grad:
            parameter.requires_grad_(needed)
    return {name: layer.get_base_layer() for name, layer in adapter_layers(skeleton, "default").items()}


def _skeleton(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    while isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    if id(module) not in done:
        clone = done[id(module)] = copy.copy(module)
        clone.__dict__.pop("peft_config", None)
        clone.__dict__["_modules"] = {
            name: None if child is None else _skeleton(child, done) for name, child in module._modules.items()
        }
    return done[id(module)]


@contextmanager
def lora_layers_disabled(model: nn.Module, own_loop: FisherEstimator | None) -> Iterator[None]:
    """The base model's output, and no hook of the own loop; afterwards everything is as before.

    `modules_to_save` stay in use: what they have learned belongs to the loss.

    Args:
        model: The model.
        own_loop: Estimator to pause, if there is one.

    Yields:
        Nothing.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    disabled = [layer.disable_adapters for layer in layers]
    requires_grad = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    try:
        if own_loop is not None:
            own_loop.paused = True
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer, was_disabled in zip(layers, disabled, strict=True):
            layer.enable_adapters(not was_disabled)
        for parameter, needed in requires_grad:
            parameter.requires_grad_(needed)
        if own_loop is not None:
            own_loop.paused = False


def estimator_of(model: nn.Module, adapter_name: str) -> FisherEstimator | None:
    """The estimator that watches an adapter's backward passes.

    Args:
        model: The model.
        adapter_name: The adapter.

    Returns:
        The estimator, or `None`.
    """
    for module in model.modules():
        if adapter_name in module.__dict__.get(_ESTIMATORS, {}):
            return module.__dict__[_ESTIMATORS][adapter_name]
    return None


def forget_estimator(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter's hooks and sums.

    Args:
        model: The model.
        adapter_name: The adapter.
    """
    for module in model.modules():
        estimators = module.__dict__.get(_ESTIMATORS, {})
        if adapter_name in estimators:
            estimators.pop(adapter_name).detach()
            if not estimators:
                del module.__dict__[_ESTIMATORS]


# --- Resizing ---


def apply_allocation(model: nn.Module, adapter_name: str, allocation: RankAllocation, new_config: LoraConfig) -> None:
    """Give every LoRA layer its rank and fresh weights, by PEFT's own layer code; then adopt the new config.

    All layers are rebuilt before anything is made final, so that a failure on the way leaves no trace.

    Args:
        model: The model.
        adapter_name: The adapter.
        allocation: Ranks and `lora_alpha` of its layers.
        new_config: The adapter's config with the patterns of the allocation.

    Raises:
        RuntimeError: If a rebuilt layer has not the rank or scaling that was meant.
    """
    layers = adapter_layers(model, adapter_name)
    before = {name: _LayerState(layer, adapter_name) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            rank, alpha = allocation.ranks[name], allocation.alphas[name]
            layer.update_layer(adapter_name, rank, lora_alpha=alpha, **_update_arguments(layer, new_config))
            before[name].carry_over(layer)
            _verify_layer(name, layer, adapter_name, rank, alpha, allocation.use_rslora)
    except BaseException:
        for name, layer in layers.items():
            before[name].restore(layer)
        raise
    for name, layer in layers.items():
        before[name].keep_parameters(layer)
    # In place, because the model and its tuner share the object.
    config = cast(Any, model).peft_config[adapter_name]
    config.__dict__.update(new_config.__dict__)


class _LayerState:
    """What a LoRA layer was before PEFT rebuilt one of its adapters."""

    def __init__(self, layer: Any, adapter_name: str) -> None:
        self._adapter_name = adapter_name
        self._entries = {
            container: getattr(layer, container)[adapter_name]
            for container in (*layer.adapter_layer_names, *layer.other_param_names, "lora_variant")
            if adapter_name in _container(layer, container)
        }
        self._parameters = dict(layer.named_parameters())
        self._requires_grad = {name: parameter.requires_grad for name, parameter in self._parameters.items()}
        self._training = {name: module.training for name, module in layer.named_modules()}

    def carry_over(self, layer: LoraLayer) -> None:
        """Give the rebuilt adapter the device, dtype, mode, dropout and `requires_grad` of the one before."""
        if "lora_dropout" in self._entries:
            layer.lora_dropout[self._adapter_name] = self._entries["lora_dropout"]
        for name, parameter in layer.named_parameters():
            old = self._parameters.get(name)
            if old is not None and old is not parameter and old.device.type != "meta":
                parameter.data = parameter.data.to(device=old.device, dtype=old.dtype)
        self._set_flags(layer)

    def keep_parameters(self, layer: LoraLayer) -> None:
        """Put the new tensors into the `nn.Parameter` objects of before, which an optimizer may hold."""
        for name, parameter in list(layer.named_parameters()):
            old = self._parameters.get(name)
            if old is None or old is parameter or old.device.type == "meta":
                continue
            old.grad = None
            old.data = parameter.data
            owner, _, attribute = name.rpartition(".")
            setattr(layer.get_submodule(owner), attribute, old)

    def restore(self, layer: LoraLayer) -> None:
        """Put everything back."""
        for container, entry in self._entries.items():
            getattr(layer, container)[self._adapter_name] = entry
        self._set_flags(layer)

    def _set_flags(self, layer: LoraLayer) -> None:
        for name, parameter in layer.named_parameters():
            if name in self._requires_grad:
                parameter.requires_grad_(self._requires_grad[name])
        for name, module in layer.named_modules():
            module.training = self._training.get(name, layer.training)


def _container(layer: LoraLayer, name: str) -> Any:
    """One of PEFT's per-adapter dictionaries of a layer; some attributes listed beside them are none."""
    container = getattr(layer, name, None)
    return container if isinstance(container, (dict, nn.ModuleDict, nn.ParameterDict)) else {}


def _update_arguments(layer: LoraLayer, config: LoraConfig) -> dict[str, Any]:
    """`update_layer` takes the config from PEFT 0.19 on, and before that the fields of it that it needs."""
    parameters = inspect.signature(layer.update_layer).parameters
    if "config" in parameters:
        return {"config": config}
    own = ("adapter_name", "r", "lora_alpha", "kwargs")
    return {name: getattr(config, name) for name in parameters if name not in own and hasattr(config, name)}


def _verify_layer(name: str, layer: LoraLayer, adapter_name: str, rank: int, alpha: float, use_rslora: bool) -> None:
    scaling = alpha / (rank**0.5 if use_rslora else rank)
    found = (layer.r[adapter_name], layer.scaling[adapter_name])
    if found[0] != rank or not torch.isclose(torch.tensor(found[1]), torch.tensor(scaling)):
        raise RuntimeError(
            f"PEFT built layer {name!r} with rank {found[0]} and scaling {found[1]}, not {rank} and {scaling}."
        )
