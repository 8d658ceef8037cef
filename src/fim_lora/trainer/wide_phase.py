"""`WidePhase`: a training with a wide adapter, from its beginning to the cut."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..adapter.adapted_part import adapted_part
from ..adapter.checks import require_active, require_unsharded
from ..adapter.factors import weights_of
from ..adapter.pending_config import lora_config_of
from ..adapter.plain_adapter import plain_adapters
from ..compression import LoraCompression, compress_lora
from ..fisher.factors import AdapterMoments, MeasuredLayer, PathMoments
from ..fisher.layers.components import AdaptedLayer
from ..fisher.recorder import Recorder
from ..runtime.data_parallel import DataParallelFinder, rebuild_reducer
from ..runtime.optimizer_state import require_optimizer
from ..spectrum import adapted_layers, checked_layers, spectrum_of
from .moments import TrainingMoments


@dataclass(frozen=True)
class WideSettings:
    """What a training does until the cut, and how the adapter is cut.

    Attributes:
        adapter_name: The adapter.
        r: The size after the cut: the parameters of this uniform rank.
        wide_scale: Factor on the updates of the adapter until the cut; `None` for the share of its parameters that
            the cut leaves.
        first_step: Number of the first optimizer step whose passes are recorded, from 0.
        cut_step: Number of optimizer steps before the cut.
        num_batches: Micro-batches that are recorded in each process.
        sequences_per_example: Sequences that make up one example.
    """

    adapter_name: str
    r: int
    wide_scale: float | None
    first_step: int
    cut_step: int
    num_batches: int
    sequences_per_example: int = 1


def step_of_share(share: float, steps: int) -> int:
    """The number of steps that this share of all steps makes, rounded up."""
    # Rounding errors must not add a step: 0.1 · 550 is above 55.
    return math.ceil(share * steps - 1e-6)


_ADVICE = "If that is wrong, cut the adapter after the training, by `get_lora_spectrum` with a dataloader"


class WidePhase:
    """A training with a wide adapter, from its beginning to the cut.

    Args:
        model: The model, without the wrappers of parallel training.
        optimizer: The trainer's optimizer.
        settings: What to do.

    Raises:
        ValueError: If the adapter is not larger than its size after the cut, is not active, is sharded, or has a form
            that cannot be truncated; or if the optimizer does not hold it.
        TypeError: If the optimizer is not one of PyTorch, or a layer's class is not supported.
    """

    def __init__(self, model: nn.Module, optimizer: Any, settings: WideSettings) -> None:
        self.settings = settings
        self._model, self._optimizer = model, optimizer
        self._part = adapted_part(model, settings.adapter_name)
        self._layers = checked_layers(self._part, settings.adapter_name)
        require_unsharded(model, self._layers)
        require_active(self._layers, settings.adapter_name)
        self._adapted = adapted_layers(self._part, self._layers, settings.adapter_name)
        share = _share_after_cut(
            lora_config_of(self._part, settings.adapter_name).r, self._layers, self._adapted, settings
        )
        self._scale = share if settings.wide_scale is None else settings.wide_scale
        self._weights = _trained_weights(optimizer, self._layers, settings.adapter_name)
        self._before: list[Tensor] = []
        shapes = {name: one.shape for name, one in plain_adapters(self._layers, settings.adapter_name).items()}
        self._moments = TrainingMoments.for_training(shapes, settings.sequences_per_example)
        statistic: AdapterMoments = self._moments
        self._recorder: Recorder[MeasuredLayer, AdapterMoments] = Recorder(self._adapted, statistic, _ADVICE)
        self._records = False
        self._finder = DataParallelFinder(model) if dist.is_available() and dist.is_initialized() else None

    def begin_step(self, step: int) -> None:
        """The passes of the optimizer step of this number begin."""
        if step < self.settings.first_step:
            return
        if not self._records:
            self._start_recorder()
        scaler = getattr(self._optimizer, "scaler", None)  # of Accelerate, for float16
        self._moments.loss_scale = 1.0 if scaler is None else float(scaler.get_scale())

    def before_update(self) -> None:
        """Remember the weights that the optimizer is about to change."""
        if self._scale != 1:
            self._before = [weight.detach().clone() for weight in self._weights]

    @torch.no_grad()
    def after_update(self) -> None:
        """Scale the update that the optimizer has made.

        Other weights of the same parameter group, such as a new classifier, keep theirs, and the rates that schedulers
        and logs see do not change. For SGD, Adam and AdamW it is the same as a scaled learning rate of the adapter.
        """
        for weight, before in zip(self._weights, self._before, strict=False):
            weight.copy_(torch.lerp(before, weight, self._scale))
        self._before = []

    def stop(self) -> None:
        """Remove all hooks."""
        self._before = []
        if self._finder is not None:
            self._finder.stop()
        if self._records:
            self._recorder.stop()
            torch.compiler.reset()  # code that was compiled before would go on calling the hooks

    def cut(self) -> LoraCompression:
        """Cut the adapter by what was recorded. Every process has to call this.

        For what it raises see `AdapterMoments.result` and `compress_lora`.
        """
        self.stop()
        moments, name = PathMoments.without_scaled(self._recorder.result()), self.settings.adapter_name
        spectrum = spectrum_of(self._adapted, plain_adapters(self._layers, name), moments, name)
        compression = compress_lora(self._model, spectrum, r=self.settings.r, optimizer=self._optimizer)
        if self._finder is not None and self._finder.found is not None:
            rebuild_reducer(self._finder.found)
        # A trainer divides its loss by numbers of batches or of tokens, so the units of a prediction are not known.
        return replace(compression, predicted=None)

    def _start_recorder(self) -> None:
        roots = [self._model]
        if isinstance(self._part, PeftModel):
            # Some trainers call the tuner, or the model inside of it.
            roots += [self._part.base_model, self._part.get_base_model()]
        if self._part is not self._model:
            roots.append(self._part)  # losses of sentence-transformers call it several times
        self._recorder.start(*roots, max_batches=self.settings.num_batches)
        self._records = True
        torch.compiler.reset()  # code that was compiled before would not call the hooks


def _share_after_cut(
    config_r: int, layers: Mapping[str, LoraLayer], adapted: Mapping[str, AdaptedLayer], settings: WideSettings
) -> float:
    """The share of the adapter's parameters that the cut leaves; below 1."""
    parameters = {name: layer.weight_shape.rank_parameters for name, layer in adapted.items()}
    present = sum(parameters[name] * layer.r[settings.adapter_name] for name, layer in layers.items())
    after = settings.r * sum(parameters.values())
    if after >= present:
        raise ValueError(
            f"The adapter has r={config_r} and {present:,} parameters, and r={settings.r} of the callback would leave "
            f"{after:,}: there is nothing to cut. Begin with a larger r in the config, such as {4 * settings.r}, or "
            "give the callback a smaller one."
        )
    return after / present


def _trained_weights(optimizer: Any, layers: Mapping[str, LoraLayer], adapter_name: str) -> list[nn.Parameter]:
    """The weights of the adapter that the optimizer holds."""
    held = {id(weight) for group in require_optimizer(optimizer).param_groups for weight in group["params"]}
    weights = [
        weight for layer in layers.values() for one in weights_of(layer, adapter_name) for weight in (one.a, one.b)
    ]
    trained = [weight for weight in weights if id(weight) in held]
    if not trained:
        raise ValueError(
            f"The optimizer holds no parameter of adapter {adapter_name!r}: train the adapter, or leave out the "
            "callback."
        )
    return trained
