"""The recorder that watches the backward passes of an adapter which awaits its ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

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

# Attribute of the base model: adapter name to `Watched`. It is a plain attribute, so that copies and pickles of the
# model include it, and state dicts do not.
_ATTRIBUTE = "_fim_lora"


@dataclass
class Watched:
    """What is known of an adapter that awaits its ranks.

    Attributes:
        recorder: Watches the backward passes; `None` in inference mode.
        converted_targets: What PEFT made of the targets in the config, if it converted them.
    """

    recorder: NormRecorder | None
    converted_targets: ConvertedTargets | None


def watch(
    tuner: LoraModel, model: nn.Module, adapter_name: str, config: LoraConfig, converted: ConvertedTargets | None
) -> None:
    """Start to watch an adapter that PEFT has just injected into `model`."""
    stop_watching(model, adapter_name)  # an earlier adapter of that name may have been unloaded
    recorder = None if config.inference_mode else _started_recorder(tuner, model, adapter_name, config)
    if recorder is not None or converted is not None:
        model.__dict__.setdefault(_ATTRIBUTE, {})[adapter_name] = Watched(recorder, converted)


def _started_recorder(tuner: LoraModel, model: nn.Module, adapter_name: str, config: LoraConfig) -> NormRecorder:
    layers = adapter_layers(model, adapter_name)
    recorder = Recorder(layers, NormSums.for_layers(layers, config.fim_config.exact))
    by_name = cast(Iterable[tuple[str, Any]], layers.items())
    adapters = {name: layer.lora_A[adapter_name] for name, layer in by_name if adapter_name in layer.lora_A}
    # Some PeftModels call the tuner, and the tuner calls `forward` of the model; others call the model itself.
    recorder.start(tuner, model, adapters=adapters, max_batches=config.fim_config.fim_calibration_batches)
    torch.compiler.reset()  # code that was compiled before would not call the hooks
    return recorder


def watched(model: nn.Module, adapter_name: str) -> Watched:
    """What is known of an adapter of a model; nothing if the adapter does not await its ranks."""
    for module in model.modules():
        if adapter_name in module.__dict__.get(_ATTRIBUTE, {}):
            found: Watched = module.__dict__[_ATTRIBUTE][adapter_name]
            return found
    return Watched(None, None)


def stop_watching(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter's hooks and sums, and what is known of its targets."""
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
    """Inside, the LoRA layers of all adapters are off and no recorder of an adapter watches; then all is restored.

    `modules_to_save` stay in use: what they have learned is part of the loss.

    Raises:
        ValueError: If an adapter is merged, because PEFT would take it out of the base weights for good.
    """
    require_unmerged(model)
    modules = list(model.modules())
    layers = [module for module in modules if isinstance(module, LoraLayer)]
    with ExitStack() as stack:
        stack.enter_context(
            requires_grad_restored([parameter for layer in layers for parameter in layer.parameters()])
        )
        for module in modules:
            for one in module.__dict__.get(_ATTRIBUTE, {}).values():
                if one.recorder is not None:
                    stack.callback(setattr, one.recorder, "paused", one.recorder.paused)
                    one.recorder.paused = True
        for layer in layers:
            stack.callback(layer.enable_adapters, not layer.disable_adapters)
            layer.enable_adapters(False)
        yield
