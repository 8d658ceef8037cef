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
from .lora_layers import adapter_layers

NormRecorder = Recorder[Norms, FimScores]

# Attribute of the base model: adapter name to `WatchedAdapter`. It is a plain attribute, so that copies and pickles of
# the model include it, and state dicts do not.
_ATTRIBUTE = "_fim_lora"


@dataclass
class WatchedAdapter:
    """What is stored for an adapter that awaits its ranks.

    `recorder` is `None` in inference mode, `converted_targets` if PEFT did not convert the targets in the config.
    """

    recorder: NormRecorder | None
    converted_targets: ConvertedTargets | None


def watch(
    tuner: LoraModel, model: nn.Module, adapter_name: str, config: LoraConfig, converted: ConvertedTargets | None
) -> None:
    """Start to watch an adapter that PEFT has just injected into `model`."""
    layers = adapter_layers(model, adapter_name)
    recorder = None
    if not config.inference_mode:
        recorder = Recorder(layers, NormSums.for_layers(layers, config.fim_config.exact))
    stop_watching(model, adapter_name)  # an earlier adapter of that name may have been unloaded
    if recorder is not None:
        adapters = {name: layer.lora_A[adapter_name] for name, layer in layers.items() if adapter_name in layer.lora_A}
        # Some PeftModels call the tuner, and the tuner calls `forward` of the model; others call the model itself.
        recorder.start(tuner, model, adapters=adapters, max_batches=config.fim_config.fim_calibration_batches)
        torch.compiler.reset()  # code that was compiled before would not call the hooks
    if recorder is not None or converted is not None:
        model.__dict__.setdefault(_ATTRIBUTE, {})[adapter_name] = WatchedAdapter(recorder, converted)


def watched_adapter(model: nn.Module, adapter_name: str) -> WatchedAdapter:
    """What is stored for an adapter of a model; nothing if the adapter does not await its ranks."""
    for module in model.modules():
        if adapter_name in module.__dict__.get(_ATTRIBUTE, {}):
            return module.__dict__[_ATTRIBUTE][adapter_name]
    return WatchedAdapter(None, None)


def stop_watching(model: nn.Module, adapter_name: str) -> None:
    """Remove the hooks of an adapter and what is stored for it."""
    for module in model.modules():
        by_adapter = module.__dict__.get(_ATTRIBUTE, {})
        if adapter_name not in by_adapter:
            continue
        recorder = by_adapter.pop(adapter_name).recorder
        if recorder is not None:
            recorder.stop()
            torch.compiler.reset()  # code that was compiled before would go on calling the hooks
        if not by_adapter:
            del module.__dict__[_ATTRIBUTE]


@contextmanager
def lora_layers_disabled(model: nn.Module) -> Iterator[None]:
    """Disable the LoRA layers of all adapters and pause their recorders; restore both when the block ends.

    `modules_to_save` stay in use, because they are part of the loss that will be trained. Raises `ValueError` if an
    adapter is merged, because PEFT would remove it from the base weights for good.
    """
    require_unmerged(model)
    modules = list(model.modules())
    layers = [module for module in modules if isinstance(module, LoraLayer)]
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    with requires_grad_restored(parameters), ExitStack() as stack:
        for module in modules:
            for adapter in module.__dict__.get(_ATTRIBUTE, {}).values():
                if adapter.recorder is not None:
                    stack.callback(setattr, adapter.recorder, "paused", adapter.recorder.paused)
                    adapter.recorder.paused = True
        for layer in layers:
            stack.callback(layer.enable_adapters, not layer.disable_adapters)
            layer.enable_adapters(False)
        yield
