"""Checkpoints whose adapter has smaller ranks than the model into which they are loaded."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..runtime.optimizer_state import set_state
from .factors import outermost_wrappers, weights_of
from .lora_layers import adapter_layers
from .pending_config import lora_config_of
from .resize import resize_adapter
from .truncate import config_after_truncation

_CREATE_AGAIN = (
    "Create model and trainer again, as at the beginning of the run, or the model by "
    "`PeftModel.from_pretrained(base_model, checkpoint, is_trainable=True)`."
)

_HANDLES: WeakKeyDictionary[nn.Module, dict[str, RemovableHandle]] = WeakKeyDictionary()


def fit_to_checkpoints(model: nn.Module, adapter_name: str, optimizer: Optimizer | None = None) -> None:
    """From now on, give the adapter the ranks of each state dict that is loaded, if these are smaller.

    A trainer resumes by loading a checkpoint into a model that was created as at the beginning, with the ranks of the
    beginning. Layers that are missing in the state dict lose their adapter. A state dict without this adapter changes
    nothing, and one with larger ranks raises `ValueError` before it is loaded. `optimizer` is one that holds the
    adapter's parameters already.
    """
    stop_fitting(model, adapter_name)
    hook = _FitToCheckpoint(adapter_name, optimizer)
    _HANDLES.setdefault(model, {})[adapter_name] = model.register_load_state_dict_pre_hook(hook)


def stop_fitting(model: nn.Module, adapter_name: str) -> None:
    """Undo `fit_to_checkpoints`."""
    handle = _HANDLES.get(model, {}).pop(adapter_name, None)
    if handle is not None:
        handle.remove()


@dataclass
class _FitToCheckpoint:
    """Hook that runs before a state dict is loaded. It is an object, so that a model with it can be copied."""

    adapter_name: str
    optimizer: Optimizer | None

    def __call__(self, model: Any, state_dict: Mapping[str, Tensor], prefix: str, *unused: Any) -> None:
        if self.adapter_name not in getattr(model, "peft_config", {}):
            return
        if not any(_adapter_of(key) == self.adapter_name for key in state_dict):
            return
        layers = adapter_layers(model, self.adapter_name)
        names = {parameter: prefix + name for name, parameter in model.named_parameters()}
        _require_known(state_dict, names.values(), self.adapter_name)
        present = {name: int(layer.r[self.adapter_name]) for name, layer in layers.items()}
        saved = {name: self._saved_rank(name, layer, state_dict, names) for name, layer in layers.items()}
        _require_distinct(model, layers, saved)
        if saved != present:
            self._resize(model, layers, saved)

    def _saved_rank(
        self, name: str, layer: LoraLayer, state_dict: Mapping[str, Tensor], names: Mapping[Tensor, str]
    ) -> int:
        """Rank of a layer in the state dict, 0 if it has no adapter there."""
        weight, rank = weights_of(layer, self.adapter_name)[0].a, int(layer.r[self.adapter_name])
        saved = state_dict.get(names[weight])
        if saved is None:
            return 0
        saved_rank = rank * saved.shape[0] // weight.shape[0]
        if saved_rank > rank:
            raise ValueError(
                f"The checkpoint has rank {saved_rank} for layer {name!r}, but the model has rank {rank}: it was "
                f"saved before the adapter was cut, or with another config. {_CREATE_AGAIN}"
            )
        return saved_rank

    def _resize(self, model: nn.Module, layers: Mapping[str, LoraLayer], ranks: Mapping[str, int]) -> None:
        removed = {
            weight: None
            for name, layer in layers.items()
            if ranks[name] == 0
            for one in weights_of(layer, self.adapter_name)
            for weight in (one.a, one.b)
        }
        ranks_before = {name: layer.r[self.adapter_name] for name, layer in layers.items()}
        scalings = {name: float(layer.scaling[self.adapter_name]) for name, layer in layers.items()}
        config = lora_config_of(model, self.adapter_name)
        new_config, alphas = config_after_truncation(config, ranks, ranks_before, scalings, serving=False)
        resize_adapter(model, layers, self.adapter_name, ranks, alphas, new_config)
        if self.optimizer is not None:
            set_state(self.optimizer, {}, removed)


def _require_known(state_dict: Iterable[str], names: Iterable[str], adapter_name: str) -> None:
    """Refuse weights of the adapter in layers that have no adapter, because PEFT would silently leave them out."""
    known = set(names)
    for key in state_dict:
        # PEFT 0.19 and later insert the name of the adapter only where the model has it.
        if key not in known and _adapter_of(key) in (adapter_name, ""):
            raise ValueError(
                f"The checkpoint has weights {key!r}, but the model has no adapter there: it was saved before the "
                f"adapter was cut, or with another config. {_CREATE_AGAIN}"
            )


def _adapter_of(key: str) -> str | None:
    """The adapter in the name of a weight, such as `….lora_A.default.weight`; empty if it is left out."""
    parts = key.split(".")
    position = next((index for index, part in enumerate(parts) if part.startswith("lora_")), None)
    if position is None:
        return None
    rest = [part for part in parts[position + 1 :] if part not in ("weight", "bias")]
    return rest[0] if rest else ""


def _require_distinct(model: nn.Module, layers: Mapping[str, LoraLayer], ranks: Mapping[str, int]) -> None:
    """Refuse a module of several adapted parameters of which one has lost its adapter.

    Their wrappers are nested, so the names of the weights do not say which parameter they belong to.
    """
    outermost = outermost_wrappers(model)
    by_module: dict[nn.Module, list[str]] = {}
    for name, layer in layers.items():
        by_module.setdefault(outermost.get(layer, layer), []).append(name)
    for names in by_module.values():
        if any(ranks[name] for name in names) and not all(ranks[name] for name in names):
            raise ValueError(
                f"The checkpoint has an adapter of only some of the parameters {names}, and its weights do not say of "
                "which. Create the model by `PeftModel.from_pretrained(base_model, checkpoint, is_trainable=True)`."
            )
