"""Everything that touches PEFT's classes.

`install` teaches `LoraConfig` the field `fim_config` and the initialisation `"fim"`, and has `LoraModel` watch the
backward passes of an adapter that awaits its ranks. The rest of the file reads and resizes LoRA layers through
their own code.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, cast

import peft
import torch
from peft import EvaConfig, LoraConfig, PeftModel
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from .config import FimConfig
from .converted_targets import ConvertedTargets
from .distributed import gathered, same_random_numbers
from .estimator import FisherEstimator
from .layer_types import TargetLayer, target_layer
from .offloading import is_offloaded, onloaded
from .rank_allocation import RankAllocation
from .wrappers import are_sharded, unwrapped, without_wrappers

_MODULE = "peft.tuners.lora.fim"
_PREFIX = "base_model.model."
# Attribute of the base model: adapter name to estimator. It is a plain attribute, so that copies and pickles of the
# model take it along, and it is in no state dict.
_ESTIMATORS = "_fim_estimators"
_CONVERTED_TARGETS = "_fim_converted_targets"


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
        if awaits_ranks(self):
            self.fim_config = self.fim_config or FimConfig()
        with _presented_as_it_will_be(self):
            plain_post_init(self)
        if self.fim_config is not None and not awaits_ranks(self):
            warnings.warn(
                "`fim_config` specified but will be ignored when `init_lora_weights` is not 'fim'.",
                stacklevel=3,
            )

    def to_dict(self: LoraConfig) -> dict[str, Any]:
        # An adapter without its ranks is plain LoRA.
        with _presented_as(self, True):
            content = plain_to_dict(self)
        content.pop("fim_config", None)
        if awaits_ranks(self):
            content["eva_config"] = None  # of which PEFT would warn whenever it is read
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


def final_initialisation(config: LoraConfig) -> bool | str:
    """What `init_lora_weights` is after the allocation.

    Args:
        config: A LoRA config.

    Returns:
        The initialisation at the final ranks. `True` for directions from EVA, which are in the weights then.
    """
    if not awaits_ranks(config):
        return config.init_lora_weights
    chosen = config.fim_config.init_lora_weights
    return True if chosen == "eva" else chosen


@contextmanager
def _presented_as(config: LoraConfig, init_lora_weights: bool | str) -> Iterator[None]:
    """Show PEFT, and whoever reads a written config, an initialisation that it knows."""
    if not awaits_ranks(config):
        yield
        return
    config.init_lora_weights = init_lora_weights
    try:
        yield
    finally:
        config.init_lora_weights = "fim"


@contextmanager
def _presented_as_it_will_be(config: LoraConfig) -> Iterator[None]:
    """Show PEFT the initialisation that is to come, so that it refuses now what does not go with it."""
    if not awaits_ranks(config):
        yield
        return
    chosen = config.fim_config.init_lora_weights
    lacks_eva_config = chosen == "eva" and config.eva_config is None
    if lacks_eva_config:
        config.eva_config = EvaConfig()  # else PEFT warns that it takes this one
    try:
        with _presented_as(config, chosen):
            yield
    finally:
        if lacks_eva_config:
            config.eva_config = None


def _watching(inject_adapter: Callable[..., None]) -> Callable[..., None]:
    def watching_inject_adapter(
        self: LoraModel, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        config = self.peft_config[adapter_name]
        if not awaits_ranks(config):
            inject_adapter(self, model, adapter_name, *args, **kwargs)
            return
        # Before anything is changed: what cannot be resized, and a layer without a defined eFIM, raise here.
        _require_resizable_form(config)
        _, converted = convert_targets(model, config)
        with _presented_as(config, True):
            inject_adapter(self, model, adapter_name, *args, **kwargs)
            _put_on_devices(model, adapter_name, config)
        if not config.inference_mode:
            _watch(self, model, adapter_name, config.fim_config)
        if converted is not None:
            model.__dict__.setdefault(_CONVERTED_TARGETS, {})[adapter_name] = converted

    watching_inject_adapter.__doc__ = inject_adapter.__doc__
    return watching_inject_adapter


def _put_on_devices(model: nn.Module, adapter_name: str, config: LoraConfig) -> None:
    """Make the adapters of offloaded layers anew. PEFT puts them on the meta device, without values."""
    for layer in cast(Iterable[Any], adapter_layers(model, adapter_name).values()):
        if not is_offloaded(layer.get_base_layer()):
            continue
        states = _states(layer, adapter_name, True)
        _rebuild(layer, adapter_name, layer.r[adapter_name], layer.lora_alpha[adapter_name], config, None)
        for state in states:
            state.carry_over()


def _watch(tuner: LoraModel, model: nn.Module, adapter_name: str, fim_config: FimConfig) -> None:
    layers, most = adapter_layers(model, adapter_name), fim_config.fim_calibration_batches
    estimator = FisherEstimator(layers, most, fim_config.exact)
    forget_estimator(model, adapter_name)  # of an adapter of that name that was unloaded
    by_name = cast(Iterable[tuple[str, Any]], layers.items())
    adapters = {name: layer.lora_A[adapter_name] for name, layer in by_name if adapter_name in layer.lora_A}
    # Some PeftModels call the tuner, and it the `forward` of the model; others call the model itself.
    estimator.attach(tuner, model, adapters=adapters)
    torch.compiler.reset()  # code compiled before would not know of the hooks
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
    """The LoRA layers of an adapter, by the names that PEFT matches with the keys of `rank_pattern`.

    Args:
        model: A `PeftModel`, or a model with injected adapters.
        adapter_name: The adapter.

    Returns:
        Name, as in the base model, to LoRA layer. A parameter has the name of its module and its own. The output
        projection of `nn.MultiheadAttention` is no entry, because PEFT gives it the rank of the whole.

    Raises:
        ValueError: If the model has no LoRA layer of that adapter.
    """
    layers = {
        _name_of(name, module): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.r
    }
    for name, layer in list(layers.items()):
        if isinstance(layer, MultiheadAttention):
            layers.pop(f"{name}.base_layer.out_proj", None)
    if not layers:
        raise ValueError(f"The model has no LoRA layer of an adapter {adapter_name!r}.")
    return layers


# Fields of `LoraConfig` with which a layer cannot get another rank once it is built, and why. Older versions of PEFT
# do not have all of them.
_NOT_RESIZABLE = {
    "kasa_config": (
        "KaSA cuts the smallest r singular values off the base weights as soon as the adapter is created, and would "
        "cut off more of them for another rank. Call `get_fim_scores` on the plain model, and create the adapter with "
        "the config that `RankAllocation.from_scores(scores, config).to_lora_config(config)` returns"
    ),
    "use_bdlora": (
        "the blocks of BD-LoRA have to divide every rank, and PEFT chooses them by a name that a layer does not know "
        "any more once it is built. Leave it out"
    ),
    "arrow_config": "a router of Arrow mixes other adapters, and its own A and B are never used. Leave it out",
}


def require_resizable(model: nn.Module, layers: Mapping[str, LoraLayer], config: LoraConfig) -> None:
    """Refuse an adapter that cannot get other ranks.

    Args:
        model: The model.
        layers: Name to LoRA layer of the adapter.
        config: The adapter's config.

    Raises:
        ValueError: If the config asks for a form of LoRA that cannot be resized, or for an initialisation that PEFT
            does not have for a layer; if adapters are merged; or if the adapter's weights are divided among processes.
    """
    _require_resizable_form(config)
    base_layers = {name: cast(Any, layer).get_base_layer() for name, layer in layers.items()}
    _require_initialisation(base_layers, final_initialisation(config))
    require_unmerged(model)
    _require_unsharded(model, layers)


def _require_resizable_form(config: LoraConfig, *, but: str = "") -> None:
    for field, reason in _NOT_RESIZABLE.items():
        if field != but and getattr(config, field, None) is not None:
            raise ValueError(f"{field} does not go together with init_lora_weights='fim': {reason}.")


def _require_initialisation(base_layers: Mapping[str, nn.Module], init_lora_weights: bool | str) -> None:
    """PEFT itself refuses convolutions, but initialises an embedding in silence as if nothing had been asked for."""
    if not isinstance(init_lora_weights, str) or not init_lora_weights.startswith(("pissa", "olora", "orthogonal")):
        return
    embeddings = [name for name, layer in base_layers.items() if isinstance(layer, nn.Embedding)]
    if embeddings:
        raise ValueError(
            f"PEFT has no init_lora_weights={init_lora_weights!r} for layer {embeddings[0]!r}, an embedding: take it "
            "out of `target_modules`, or use another initialisation."
        )


def require_unmerged(model: nn.Module) -> None:
    """Refuse a model with merged adapters.

    A merged layer that gets a new A and B would keep the update by the old ones in its base weight for good. And
    where adapters are disabled, PEFT takes merged ones out of the base weight, and does not put them back.

    Args:
        model: The model.

    Raises:
        ValueError: If an adapter is merged. It names the adapters and a layer.
    """
    merged = {
        name_in_base_model(without_wrappers(name)): module.merged_adapters
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and module.merged_adapters
    }
    if not merged:
        return
    adapters = sorted({adapter for adapters in merged.values() for adapter in adapters})
    others = f" and {len(merged) - 1} more" if len(merged) > 1 else ""
    raise ValueError(
        f"Adapters {adapters} are merged into the base weights of layer {next(iter(merged))!r}{others}, which can be "
        "neither calibrated nor given other ranks in this state: call `unmerge_adapter()` first."
    )


def _require_unsharded(model: nn.Module, layers: Mapping[str, LoraLayer]) -> None:
    """No wrapper lets what it has divided among processes change its shape."""
    in_fsdp1 = _in_fsdp1(model)
    sharded = [
        name
        for name, layer in layers.items()
        if in_fsdp1 or any(are_sharded(_own_parts(one)[1].values()) for one in _rebuilt_together(layer))
    ]
    if not sharded:
        return
    raise ValueError(
        f"The adapter of layer {sharded[0]!r} is sharded, and cannot change its rank any more. Call "
        "`initialize_lora_fim_ranks` before the model is sharded. If the model is too large for that, call "
        "`get_fim_scores` on the sharded model without adapter, and create the adapter with the config that "
        "`RankAllocation.from_scores(scores, config).to_lora_config(config)` returns."
    )


def _name_of(name: str, layer: LoraLayer) -> str:
    name = name_in_base_model(without_wrappers(name))
    if not isinstance(layer, ParamWrapper):
        return name
    # The wrappers of several parameters of one module are nested.
    return f"{name.replace('.base_layer', '')}.{layer.parameter_name}"


def resolve_targets(model: nn.Module, config: LoraConfig) -> dict[str, TargetLayer]:
    """The layers that PEFT would adapt.

    Args:
        model: See `convert_targets`.
        config: See `convert_targets`.

    Returns:
        Name, as in the base model, to the layer in the model.

    Raises:
        TypeError: See `convert_targets`.
        ValueError: See `convert_targets`.
    """
    return convert_targets(model, config)[0]


def convert_targets(model: nn.Module, config: LoraConfig) -> tuple[dict[str, TargetLayer], ConvertedTargets | None]:
    """The layers that PEFT would adapt, and what it would make of the targets in the config.

    They are found by PEFT's own injection into a skeleton of the model. It shares every tensor with the model and has
    modules of its own; the adapters in it are on the meta device. Nothing in model and config changes.

    Args:
        model: The model; adapters it has already are looked through.
        config: The LoRA config.

    Returns:
        Name, as in the base model, to the layer in the model; and the targets that the config would have then, if
        PEFT converts them for this model.

    Raises:
        TypeError: If a layer's class is not supported.
        ValueError: If PEFT finds nothing to adapt or ties adapters, the config is not a LoRA config, or it awaits its
            ranks and PEFT does not have its initialisation for a layer.
    """
    if not isinstance(config, LoraConfig):
        raise ValueError(f"peft_config must be a LoraConfig, got {type(config).__name__}.")
    flattened = _in_fsdp1(model)
    model = unwrapped(model)
    if isinstance(model, PeftModel):
        model = model.get_base_model()  # whose names a regular expression must match whole
    if awaits_ranks(config):
        _require_resizable_form(config, but="kasa_config")
    init_lora_weights = final_initialisation(config) if awaits_ranks(config) else True
    given, config = config, copy.deepcopy(config)
    config.init_lora_weights = True
    config.use_dora = False
    config.layer_replication = None  # would change the config of the model, which the skeleton shares
    clones: dict[int, tuple[nn.Module, nn.Module]] = {}
    skeleton = _skeleton(model, clones)
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with warnings.catch_warnings():
            # They come again, once, when the adapter is created.
            warnings.simplefilter("ignore")
            LoraModel(skeleton, {"default": config}, "default", low_cpu_mem_usage=True)
    except ValueError as error:
        if flattened:
            raise ValueError(f"{_FLATTENED} PEFT says: {error}") from error
        raise
    finally:
        for parameter, needed in requires_grad:
            parameter.requires_grad_(needed)
    tied = getattr(config, "target_modules_to_tie", None)
    if tied:
        raise ValueError(
            f"With ensure_weight_tying=True PEFT makes one adapter of {sorted(tied)} and the input embedding, for "
            "which there can be no two ranks: set it to False, or target one of them."
        )
    originals = {id(clone): original for original, clone in clones.values()}
    targets = {name: target_layer(name, layer) for name, layer in adapter_layers(skeleton, "default").items()}
    _require_initialisation({name: target.module for name, target in targets.items()}, init_lora_weights)
    if flattened:
        _require_parameters(config, targets)
    targets = {
        name: dataclasses.replace(target, module=originals[id(target.module)]) for name, target in targets.items()
    }
    return targets, ConvertedTargets.between(given, config, targets)


def _require_parameters(config: LoraConfig, targets: Iterable[str]) -> None:
    """FSDP1 may hide parameters, and PEFT would go on without them."""
    wanted = config.target_parameters or ()
    hidden = [name for name in wanted if not any(f".{target}".endswith(f".{name}") for target in targets)]
    if hidden:
        raise ValueError(f"{_FLATTENED} It finds no parameter {hidden[0]!r}.")


_FLATTENED = (
    "FullyShardedDataParallel flattens the parameters, so PEFT cannot see their names and shapes: use FSDP2 "
    "(`fully_shard`), which keeps them."
)


def _in_fsdp1(model: nn.Module) -> bool:
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def _skeleton(module: nn.Module, clones: dict[int, tuple[nn.Module, nn.Module]]) -> nn.Module:
    module = unwrapped(module)
    while isinstance(module, BaseTunerLayer):
        module = unwrapped(module.get_base_layer())
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    if id(module) not in clones:
        # Not `copy.copy`, which calls the constructor of classes that FSDP2 and parametrizations make on the fly.
        clone = object.__new__(type(module))
        clone.__dict__.update(module.__dict__)
        clones[id(module)] = (module, clone)
        clone.__dict__.pop("peft_config", None)
        # PEFT registers the weights of nn.MultiheadAttention anew.
        clone.__dict__["_parameters"] = dict(module._parameters)
        clone.__dict__["_modules"] = {
            name: None if child is None else _skeleton(child, clones) for name, child in module._modules.items()
        }
    return clones[id(module)][1]


@contextmanager
def lora_layers_disabled(model: nn.Module) -> Iterator[None]:
    """The base model's output, and no hook of an adapter that awaits its ranks; afterwards everything is as before.

    `modules_to_save` stay in use: what they have learned belongs to the loss.

    Args:
        model: The model.

    Yields:
        Nothing.

    Raises:
        ValueError: If an adapter is merged, because PEFT would take it out of the base weights for good.
    """
    require_unmerged(model)
    modules = list(model.modules())
    estimators = [
        (estimator, estimator.paused)
        for module in modules
        for estimator in module.__dict__.get(_ESTIMATORS, {}).values()
    ]
    layers = [module for module in modules if isinstance(module, LoraLayer)]
    disabled = [layer.disable_adapters for layer in layers]
    requires_grad = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    try:
        for estimator, _ in estimators:
            estimator.paused = True
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer, was_disabled in zip(layers, disabled, strict=True):
            layer.enable_adapters(not was_disabled)
        for parameter, needed in requires_grad:
            parameter.requires_grad_(needed)
        for estimator, was_paused in estimators:
            estimator.paused = was_paused


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


def converted_targets_of(model: nn.Module, adapter_name: str) -> ConvertedTargets | None:
    """What PEFT made of the targets in the config of an adapter that awaits its ranks.

    Args:
        model: The model.
        adapter_name: The adapter.

    Returns:
        The targets, or `None` if PEFT converted none.
    """
    found = (module.__dict__.get(_CONVERTED_TARGETS, {}).get(adapter_name) for module in model.modules())
    return next((converted for converted in found if converted is not None), None)


def forget_estimator(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter's hooks and sums, and what is known of its targets.

    Args:
        model: The model.
        adapter_name: The adapter.
    """
    for module in model.modules():
        converted = module.__dict__.get(_CONVERTED_TARGETS, {})
        if converted.pop(adapter_name, None) is not None and not converted:
            del module.__dict__[_CONVERTED_TARGETS]
        estimators = module.__dict__.get(_ESTIMATORS, {})
        if adapter_name in estimators:
            estimators.pop(adapter_name).detach()
            torch.compiler.reset()  # code compiled before would go on with the hooks
            if not estimators:
                del module.__dict__[_ESTIMATORS]


# --- Resizing ---


def apply_allocation(
    model: nn.Module,
    layers: Mapping[str, LoraLayer],
    adapter_name: str,
    allocation: RankAllocation,
    new_config: LoraConfig,
    directions: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Give every LoRA layer its rank and fresh weights, by PEFT's own layer code; then adopt the new config.

    All layers are rebuilt before anything is made final, so that a failure on the way leaves no trace. A layer of
    rank 0 loses the adapter.

    Args:
        model: The model.
        layers: Name to LoRA layer of the adapter.
        adapter_name: The adapter.
        allocation: Ranks and `lora_alpha` of its layers.
        new_config: The adapter's config with the patterns of the allocation.
        directions: Layer name to the new value of A (r_i × d_in), for an initialisation of A from data.

    Raises:
        ValueError: If a rank is 0 and PEFT could not load the rest, or PEFT refuses the initialisation for a layer.
        TypeError: If PEFT cannot initialise a layer from a weight of its dtype.
        RuntimeError: If a rebuilt layer has not the rank or scaling that was meant.
    """
    dropped = {name: layer for name, layer in layers.items() if allocation.ranks[name] == 0}
    if dropped:
        _require_droppable(model, adapter_name, dropped, set(layers) - set(dropped), new_config)
    kept = {name: layer for name, layer in layers.items() if name not in dropped}
    _require_weights_at_hand(kept, new_config.init_lora_weights)
    before = {name: _states(layer, adapter_name, new_config.init_lora_weights) for name, layer in kept.items()}

    def rebuild() -> None:
        for name, layer in kept.items():
            rank, alpha = allocation.ranks[name], allocation.alphas[name]
            a = None if directions is None else directions.get(name)
            _rebuild(layer, adapter_name, rank, alpha, new_config, a)
            for state in before[name]:
                state.carry_over()
                _verify_layer(name, state.layer, adapter_name, rank, alpha, new_config)

    try:
        with same_random_numbers(*model.parameters()):
            gathered(rebuild)
    except BaseException:
        for states in before.values():
            for state in states:
                state.restore()
        raise
    for states in before.values():
        for state in states:
            state.keep_parameters()
    if dropped:
        parents = _parents(model)
        for layer in dropped.values():
            _drop(parents, layer, adapter_name, new_config.bias)
        _forget_targets(model, (name for name, layer in dropped.items() if not set(layer.r) - {adapter_name}))
    # In place, because the model and its tuner share the object.
    config = cast(Any, model).peft_config[adapter_name]
    config.__dict__.update(new_config.__dict__)


def _rebuild(
    layer: Any, adapter_name: str, rank: int, alpha: float, config: LoraConfig, a: torch.Tensor | None
) -> None:
    if a is not None:
        config = copy.copy(config)
        config.init_lora_weights = "eva"  # PEFT's name for: B is zero, and A comes
    # PEFT puts the adapter where the base weight is.
    with onloaded(layer.get_base_layer()):
        layer.update_layer(adapter_name, rank, lora_alpha=alpha, **_update_arguments(layer, config))
    if a is not None:
        weight = layer.lora_A[adapter_name].weight
        weight.data = a.to(device=weight.device, dtype=weight.dtype).contiguous()


def _states(layer: Any, adapter_name: str, init_lora_weights: bool | str) -> list[_LayerState]:
    return [_LayerState(one, adapter_name, init_lora_weights) for one in _rebuilt_together(layer)]


def _rebuilt_together(layer: Any) -> list[Any]:
    """A layer, and the one that PEFT rebuilds with it."""
    return [layer, layer.base_layer.out_proj] if isinstance(layer, MultiheadAttention) else [layer]


class _LayerState:
    """What a LoRA layer was before PEFT rebuilt one of its adapters."""

    def __init__(self, layer: Any, adapter_name: str, init_lora_weights: bool | str) -> None:
        self.layer = layer
        self._adapter_name = adapter_name
        self._entries = {
            container: entries[adapter_name]
            for container in (*layer.adapter_layer_names, *layer.other_param_names, "lora_variant")
            if adapter_name in (entries := _container(layer, container))
        }
        self._modules, self._parameters = _own_parts(layer)
        self._old_parameters = self._parameters
        self._requires_grad = {name: parameter.requires_grad for name, parameter in self._parameters.items()}
        self._training = {name: module.training for name, module in self._modules.items()}
        self._base_weight = _BaseWeight.changed_by(init_lora_weights, layer)

    def carry_over(self) -> None:
        """Give the rebuilt adapter the device, dtype, mode, dropout and `requires_grad` of the one before."""
        if "lora_dropout" in self._entries:
            self.layer.lora_dropout[self._adapter_name] = self._entries["lora_dropout"]
        self._modules, self._parameters = _own_parts(self.layer)
        for name, parameter in self._parameters.items():
            old = self._old_parameters.get(name)
            if old is None or old is parameter:
                continue
            device = parameter.device if old.device.type == "meta" else old.device
            parameter.data = parameter.data.to(device=device, dtype=old.dtype)
        for container, before in self._entries.items():
            buffers = _container(self.layer, container)
            if isinstance(buffers, BufferDict):
                buffers[self._adapter_name] = buffers[self._adapter_name].to(dtype=before.dtype)
        self._set_flags()

    def keep_parameters(self) -> None:
        """Put the new tensors into the `nn.Parameter` objects of before, which an optimizer may hold."""
        for name, parameter in self._parameters.items():
            old = self._old_parameters.get(name)
            if old is None or old is parameter or old.device.type == "meta":
                continue
            old.grad = None
            # A graph of before, such as that of a loss still in scope, keeps the node that accumulates the gradient,
            # which knows the old shape. PyTorch makes a new one only if the dtype changes.
            old.data = old.data.new_empty(0, dtype=torch.complex64)
            old.data = parameter.data
            owner, attribute = name
            setattr(self._modules[owner], attribute, old)

    def restore(self) -> None:
        """Put everything back."""
        for container, entry in self._entries.items():
            getattr(self.layer, container)[self._adapter_name] = entry
        if self._base_weight is not None:
            self._base_weight.restore()
        self._modules, self._parameters = _own_parts(self.layer)
        self._set_flags()

    def _set_flags(self) -> None:
        for name, parameter in self._parameters.items():
            if name in self._requires_grad:
                parameter.requires_grad_(self._requires_grad[name])
        for module_name, module in self._modules.items():
            training = self._training.get(module_name, self.layer.training)
            if module.training != training:
                module.training = training


def _own_parts(layer: LoraLayer) -> tuple[dict[str, nn.Module], dict[tuple[str, str], nn.Parameter]]:
    """A layer's modules, and their parameters by the name of the module and their own.

    Without the base layer, in which other LoRA layers may lie.
    """
    base = layer.base_layer
    modules: list[tuple[str, nn.Module]] = [("", cast(nn.Module, layer))]
    for name, module in modules:  # which grows on the way
        for child_name, child in module._modules.items():
            if child is not None and child is not base:
                modules.append((f"{name}.{child_name}", child))
    parameters = {
        (name, own_name): parameter
        for name, module in modules
        for own_name, parameter in module._parameters.items()
        if parameter is not None
    }
    return dict(modules), parameters


def _require_weights_at_hand(layers: Mapping[str, LoraLayer], init_lora_weights: bool | str) -> None:
    """What is changed in an offloaded weight is lost."""
    if not _changes_weight(init_lora_weights):
        return
    offloaded = [name for name, layer in layers.items() if is_offloaded(layer.get_base_layer())]
    if offloaded:
        raise ValueError(
            f"init_lora_weights={init_lora_weights!r} changes the base weight, but that of layer {offloaded[0]!r} is "
            "offloaded: load the model without offloading, or choose another initialisation."
        )


def _changes_weight(init_lora_weights: bool | str) -> bool:
    return isinstance(init_lora_weights, str) and init_lora_weights.startswith(("pissa", "olora"))


@dataclasses.dataclass
class _BaseWeight:
    """What a base weight was before an initialisation took the adapter out of it."""

    base_layer: Any
    parameter: nn.Parameter
    values: torch.Tensor
    quant_state: Any

    @classmethod
    def changed_by(cls, init_lora_weights: bool | str, layer: Any) -> _BaseWeight | None:
        base_layer = layer.get_base_layer()
        parameter = base_layer._parameters.get("weight")
        if parameter is None or not _changes_weight(init_lora_weights):
            return None
        values = parameter.data
        if init_lora_weights == "olora" and values.dtype == torch.float32:
            values = values.clone()  # from which OLoRA subtracts in place
        return cls(base_layer, parameter, values, getattr(base_layer, "quant_state", None))

    def restore(self) -> None:
        # OLoRA gives a layer of bitsandbytes another parameter, which holds other statistics of the quantisation.
        self.base_layer.weight = self.parameter
        self.parameter.data = self.values
        if hasattr(self.base_layer, "quant_state"):
            self.base_layer.quant_state = self.quant_state


def _require_droppable(
    model: nn.Module, adapter_name: str, dropped: Mapping[str, LoraLayer], kept: set[str], config: LoraConfig
) -> None:
    for name, layer in dropped.items():
        others = sorted(set(layer.r) - {adapter_name})
        if isinstance(layer, ParamWrapper) and others:
            raise ValueError(
                f"Parameter {name!r} got rank 0, but adapter {others[0]!r} adapts it too, and PEFT tells parameters "
                "apart by the order in which they are wrapped: use r_min=1, or delete the other adapter first."
            )
    found = set(resolve_targets(model, config))
    if found != kept:
        raise ValueError(
            f"Without the layers of rank 0, PEFT would adapt other layers than meant: {sorted(found ^ kept)}. Use "
            "r_min=1."
        )


def _parents(model: nn.Module) -> dict[nn.Module, tuple[nn.Module, str]]:
    """Where every module is: in which other one, and under which name."""
    parents: dict[nn.Module, tuple[nn.Module, str]] = {}
    for module in model.modules():
        for name, child in module.named_children():
            parents.setdefault(child, (module, name))
    return parents


def _drop(parents: dict[nn.Module, tuple[nn.Module, str]], layer: Any, adapter_name: str, bias: str) -> None:
    """Take an adapter off a layer, and the LoRA layer away if it was the last."""
    for state in _states(layer, adapter_name, True):
        for name, parameter in state.layer.named_parameters():
            if "lora_" in name:
                parameter.grad = None
    if set(layer.r) - {adapter_name}:
        for state in _states(layer, adapter_name, True):
            _delete_adapter(state.layer, adapter_name)
        return
    parent, attribute = parents[layer]
    if isinstance(layer, MultiheadAttention):
        base = layer.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
    elif isinstance(layer, ParamWrapper):
        base = layer.base_layer  # a further wrapper, if several parameters are adapted
    else:
        base = layer.get_base_layer()
    if bias == "lora_only" and not isinstance(base, ParamWrapper):
        base.requires_grad_(False)
    setattr(parent, attribute, base)
    parents[base] = parent, attribute


def _delete_adapter(layer: Any, adapter_name: str) -> None:
    """Delete an adapter of a layer without another one taking its place, as PEFT would have it."""
    active = list(layer.active_adapters)
    needed = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that another one takes its place
        layer.delete_adapter(adapter_name)
    layer.set_adapter(active)
    for parameter, requires_grad in needed:
        parameter.requires_grad_(requires_grad)


def _forget_targets(model: nn.Module, dropped: Iterable[str]) -> None:
    """PEFT's own list of what it adapted."""
    names = set(dropped)
    for module in model.modules():
        for attribute in ("targeted_module_names", "targeted_parameter_names"):
            if isinstance(module, LoraModel) and attribute in module.__dict__:
                module.__dict__[attribute] = [name for name in module.__dict__[attribute] if name not in names]


def _container(layer: LoraLayer, name: str) -> Any:
    """One of PEFT's per-adapter dictionaries of a layer; some attributes listed beside them are none."""
    container = getattr(layer, name, None)
    return container if isinstance(container, (dict, nn.ModuleDict, nn.ParameterDict, BufferDict)) else {}


def _update_arguments(layer: LoraLayer, config: LoraConfig) -> dict[str, Any]:
    """`update_layer` takes the config from PEFT 0.19 on, and before that the fields of it that it needs."""
    signatures = (
        _parameter_names(owner.__dict__["update_layer"])
        for owner in type(layer).__mro__
        if "update_layer" in owner.__dict__
    )
    # That of nn.MultiheadAttention only passes on what it gets.
    parameters = next(parameters for parameters in signatures if "r" in parameters)
    if "config" in parameters:
        return {"config": config}
    own = ("self", "adapter_name", "r", "lora_alpha", "kwargs")
    return {name: getattr(config, name) for name in parameters if name not in own and hasattr(config, name)}


@functools.cache
def _parameter_names(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _verify_layer(name: str, layer: LoraLayer, adapter_name: str, rank: int, alpha: float, config: LoraConfig) -> None:
    scaling = alpha / (rank**0.5 if config.use_rslora else rank)
    found = (layer.r[adapter_name], layer.scaling[adapter_name])
    if found[0] != rank or not math.isclose(found[1], scaling, rel_tol=1e-5):
        raise RuntimeError(
            f"PEFT built layer {name!r} with rank {found[0]} and scaling {found[1]}, not {rank} and {scaling}."
        )
    for factor in (factors[adapter_name] for factors in (layer.lora_A, layer.lora_B) if adapter_name in factors):
        if isinstance(factor, nn.Linear) and factor.weight.shape != (factor.out_features, factor.in_features):
            raise RuntimeError(
                f"PEFT gave layer {name!r} weights of a shape that does not fit it: it does not support "
                f"init_lora_weights={config.init_lora_weights!r} for {type(layer.get_base_layer()).__name__}."
            )
