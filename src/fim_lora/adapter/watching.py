"""Watching the backward passes of an adapter that awaits its ranks, from `get_peft_model` to its allocation."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn

from ..fisher.converted_targets import ConvertedTargets
from ..fisher.norm_sums import Norms, NormSums
from ..fisher.recorder import Recorder
from ..fisher.scores import FimScores
from ..runtime.flags import requires_grad_restored
from .checks import require_unmerged
from .factors import weights_of
from .forgotten import ForgottenAllocation
from .lora_layers import adapter_layers

NormRecorder = Recorder[Norms, FimScores]

# Attribute of the base model and of its LoRA layers: adapter name to `WatchedAdapter`. It is a plain attribute, so
# that copies and pickles of the model include it, and state dicts do not.
_ATTRIBUTE = "_fim_lora"


@dataclass
class WatchedAdapter:
    """What is stored for an adapter that awaits its ranks.

    `recorder` and `forgotten` are `None` in inference mode, `converted_targets` if PEFT did not convert the targets in
    the config.
    """

    recorder: NormRecorder | None
    converted_targets: ConvertedTargets | None
    forgotten: ForgottenAllocation | None = None


def watch(
    tuner: LoraModel, model: nn.Module, adapter_name: str, config: LoraConfig, converted: ConvertedTargets | None
) -> None:
    """Start to watch an adapter that PEFT has just injected into `model`."""
    layers = adapter_layers(model, adapter_name)
    recorder, forgotten = None, None
    if not config.inference_mode:
        recorder = Recorder(layers, NormSums.for_layers(layers, config.fim_config.exact))
    stop_watching(model, adapter_name)  # an earlier adapter of that name may have been unloaded
    if recorder is not None:
        adapters = {name: layer.lora_A[adapter_name] for name, layer in layers.items() if adapter_name in layer.lora_A}
        # Some PeftModels call the tuner, and the tuner calls `forward` of the model; others call the model itself.
        recorder.start(tuner, model, adapters=adapters, max_batches=config.fim_config.fim_calibration_batches)
        first = next(iter(layers.values()))
        forgotten = ForgottenAllocation(adapter_name, weights_of(first, adapter_name)[0].b, recorder)
        torch.compiler.reset()  # code that was compiled before would not call the hooks
    if recorder is not None or converted is not None:
        watched = WatchedAdapter(recorder, converted, forgotten)
        for module in (model, *layers.values()):
            module.__dict__.setdefault(_ATTRIBUTE, {})[adapter_name] = watched


def watched_adapter(model: nn.Module, adapter_name: str) -> WatchedAdapter:
    """What is stored for an adapter of a model; nothing if the adapter does not await its ranks."""
    for module in model.modules():
        if adapter_name in module.__dict__.get(_ATTRIBUTE, {}):
            return module.__dict__[_ATTRIBUTE][adapter_name]
    return WatchedAdapter(None, None)


def stop_watching(model: nn.Module, adapter_name: str) -> None:
    """Remove the hooks of an adapter and what is stored for it."""
    for module in model.modules():
        _stop_watching(module, adapter_name)


def stop_watching_all(model: nn.Module) -> None:
    """Remove the hooks of all adapters of a model that await their ranks, and what is stored for them."""
    for module in model.modules():
        for adapter_name in list(module.__dict__.get(_ATTRIBUTE, {})):
            _stop_watching(module, adapter_name)


def stop_watching_layer(layer: LoraLayer, adapter_name: str) -> None:
    """As `stop_watching`, for code that knows only one layer of the adapter, such as PEFT's `delete_adapter`."""
    _stop_watching(layer, adapter_name)


def _stop_watching(module: nn.Module, adapter_name: str) -> None:
    by_adapter = module.__dict__.get(_ATTRIBUTE, {})
    if adapter_name not in by_adapter:
        return
    watched = by_adapter.pop(adapter_name)
    if not by_adapter:
        del module.__dict__[_ATTRIBUTE]
    if watched.recorder is not None:
        watched.recorder.stop()
        torch.compiler.reset()  # code that was compiled before would go on calling the hooks
    if watched.forgotten is not None:
        watched.forgotten.stop()
    # Other modules may still refer to it.
    watched.recorder = watched.converted_targets = watched.forgotten = None


@contextmanager
def lora_layers_disabled(model: nn.Module, part: nn.Module | None = None) -> Iterator[None]:
    """Disable the LoRA layers of all adapters and pause their recorders; restore both when the block ends.

    If only a part of the model was adapted, `part` is that part, and adapters in other parts stay in use, as
    `modules_to_save` do, because they belong to the loss that will be trained. Raises `ValueError` if an adapter is
    merged, because PEFT would remove it from the base weights for good.
    """
    part = model if part is None else part
    require_unmerged(part)
    layers = [module for module in part.modules() if isinstance(module, LoraLayer)]
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    with requires_grad_restored(parameters), ExitStack() as stack:
        for recorder in _recorders(model):
            stack.callback(setattr, recorder, "paused", recorder.paused)
            recorder.paused = True
        for layer in layers:
            stack.callback(layer.enable_adapters, not layer.disable_adapters)
            layer.enable_adapters(False)
        yield


def _recorders(model: nn.Module) -> list[NormRecorder]:
    watched = [one for module in model.modules() for one in module.__dict__.get(_ATTRIBUTE, {}).values()]
    return list({id(one.recorder): one.recorder for one in watched if one.recorder is not None}.values())
