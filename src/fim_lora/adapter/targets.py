"""The layers that PEFT would adapt in a plain model, found by PEFT's own injection into a skeleton of the model."""

import copy
import dataclasses
import warnings
from collections.abc import Iterable
from difflib import SequenceMatcher

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..fisher.converted_targets import ConvertedTargets
from ..fisher.layers.registry import TargetLayer, target_layer
from ..runtime.flags import requires_grad_restored
from ..runtime.wrappers import unwrap, uses_fsdp1
from .checks import require_initialization, require_resizable_form
from .lora_layers import adapter_layers
from .patterns import resolve_pattern
from .pending_config import awaits_ranks, final_initialization
from .target_modules import is_expression, require_all_matched

_FLATTENED = (
    "FullyShardedDataParallel flattens the parameters, so PEFT cannot see their names and shapes: use FSDP2 "
    "(`fully_shard`), which keeps them."
)
# Part of PEFT's error.
_NOTHING_FOUND = "not found in the base model"
_MAX_NAMES_SHOWN = 8


def resolve_targets(model: nn.Module, config: LoraConfig) -> dict[str, TargetLayer]:
    """The layers of `convert_targets`."""
    return convert_targets(model, config)[0]


def convert_targets(model: nn.Module, config: LoraConfig) -> tuple[dict[str, TargetLayer], ConvertedTargets | None]:
    """The layers that PEFT would adapt, by name in the base model, and the config's targets if PEFT converts them.

    PEFT adapts a skeleton, which shares every tensor with the model and has its own modules; the adapters in it are on
    the meta device. Nothing in model and config changes. Existing adapters of the model are ignored.

    Raises:
        TypeError: If a layer's class is not supported.
        ValueError: If PEFT finds nothing to adapt, an entry of a list of targets matches nothing, PEFT ties adapters,
            the config is not a LoRA config, or it awaits its ranks and PEFT does not have its initialization for a
            layer.
    """
    if not isinstance(config, LoraConfig):
        raise ValueError(f"peft_config must be a LoraConfig, got {type(config).__name__}.")
    is_flattened = uses_fsdp1(model)
    model = unwrap(model)
    if isinstance(model, PeftModel):
        model = model.get_base_model()  # a regular expression in the targets must match the whole names in it
    if awaits_ranks(config):
        require_resizable_form(config, except_for="kasa_config")
    injected = _injectable(config)
    clones: dict[int, tuple[nn.Module, nn.Module]] = {}
    skeleton = _skeleton(model, clones)
    names = [[name for name, _ in found] for found in (skeleton.named_modules(), skeleton.named_parameters())]
    _inject(skeleton, injected, model, is_flattened)
    _require_untied(injected)
    originals = {id(clone): original for original, clone in clones.values()}
    targets = {name: target_layer(name, layer) for name, layer in adapter_layers(skeleton, "default").items()}
    if awaits_ranks(config):
        base_layers = {name: target.module for name, target in targets.items()}
        require_initialization(base_layers, final_initialization(config))
    if is_flattened:
        _require_parameters(config, targets)
    if config.target_modules is not None:  # otherwise they are PEFT's for this kind of model
        require_all_matched(injected, *names)
    targets = {
        name: dataclasses.replace(target, module=originals[id(target.module)]) for name, target in targets.items()
    }
    return targets, _conversion(config, injected, targets)


def _injectable(config: LoraConfig) -> LoraConfig:
    """A copy of the config that changes no weight and needs none."""
    config = copy.deepcopy(config)
    config.init_lora_weights = True
    config.use_dora = False
    config.layer_replication = None  # would change the config of the model, which the skeleton shares
    return config


def _inject(skeleton: nn.Module, config: LoraConfig, model: nn.Module, is_flattened: bool) -> None:
    with requires_grad_restored(model.parameters()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same warnings appear once, when the adapter is created
        try:
            LoraModel(skeleton, {"default": config}, "default", low_cpu_mem_usage=True)
        except ValueError as error:
            if is_flattened:
                raise ValueError(f"{_FLATTENED} PEFT says: {error}") from error
            if _NOTHING_FOUND in str(error):
                raise ValueError(f"{error} {_linear_layers(skeleton, config)}") from error
            raise


def _linear_layers(model: nn.Module, config: LoraConfig) -> str:
    """A sentence with the names of the linear layers, those first that are most like the targets of the config."""
    names = {name.rpartition(".")[2] for name, one in model.named_modules() if isinstance(one, (nn.Linear, Conv1D))}
    if not names:
        return "The model has no linear layers."
    targets = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules or [""]
    likeness = {name: max(SequenceMatcher(None, name, target).ratio() for target in targets) for name in names}
    nearest = sorted(names, key=lambda name: (-likeness[name], name))[:_MAX_NAMES_SHOWN]
    return f"Linear layers of the model are {', '.join(map(repr, nearest))}."


def _require_untied(config: LoraConfig) -> None:
    if tied := getattr(config, "target_modules_to_tie", None):
        raise ValueError(
            f"With ensure_weight_tying=True PEFT makes one adapter of {sorted(tied)} and the input embedding, "
            "which share one adapter and therefore one rank: set it to False, or target one of them."
        )


def _require_parameters(config: LoraConfig, targets: Iterable[str]) -> None:
    """FSDP1 may hide parameters, and PEFT would go on without them."""
    wanted = config.target_parameters or ()
    hidden = [name for name in wanted if not any(f".{target}".endswith(f".{name}") for target in targets)]
    if hidden:
        raise ValueError(f"{_FLATTENED} It finds no parameter {hidden[0]!r}.")


def _skeleton(module: nn.Module, clones: dict[int, tuple[nn.Module, nn.Module]]) -> nn.Module:
    """A copy of the tree of modules without wrappers and adapters; `clones` has id to module and its copy."""
    module = unwrap(module)
    while isinstance(module, BaseTunerLayer):
        module = unwrap(module.get_base_layer())
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    if id(module) not in clones:
        # Not `copy.copy`, which calls the constructor of classes that FSDP2 and parametrizations make on the fly.
        clone = object.__new__(type(module))
        clone.__dict__.update(module.__dict__)
        clones[id(module)] = (module, clone)
        clone.__dict__.pop("peft_config", None)
        # PEFT registers the weights of nn.MultiheadAttention again.
        clone.__dict__["_parameters"] = dict(module._parameters)
        clone.__dict__["_modules"] = {
            name: None if child is None else _skeleton(child, clones) for name, child in module._modules.items()
        }
    return clones[id(module)][1]


def _conversion(before: LoraConfig, after: LoraConfig, names: Iterable[str]) -> ConvertedTargets | None:
    """What PEFT converted in a config when it adapted the layers `names`.

    The result is `None` if nothing was converted, and PEFT has at most filled in names of modules.
    """
    # Configs written by older versions of PEFT do not have `target_parameters`.
    old, new = (frozenset(getattr(config, "target_parameters", None) or ()) for config in (before, after))
    resolved = is_expression(before.target_modules) and not isinstance(after.target_modules, str)
    if old == new and not resolved:
        return None
    own = before.rank_pattern or {}
    added = {key: rank for key, rank in (after.rank_pattern or {}).items() if key not in own}
    ranks = resolve_pattern(added, names, before.r)
    fused = {name: rank // before.r for name, rank in ranks.items() if rank != before.r}
    return ConvertedTargets(frozenset(after.target_modules or ()), new, fused)
