"""`get_fim_scores`: from a model and batches to the eFIM score of every layer."""

from collections.abc import Iterable, Mapping
from typing import Any

from peft import LoraConfig
from torch import nn

from .adapter.adapted_part import adapted_part, adapted_parts, part_to_adapt
from .adapter.lora_layers import adapter_layers
from .adapter.pending_config import lora_config_of
from .adapter.targets import convert_targets
from .adapter.watching import lora_layers_disabled, watched_adapter
from .config import FimConfig
from .fisher.calibration import ForwardFn, calibrate
from .fisher.layers.registry import TargetLayer
from .fisher.norm_sums import NormSums
from .fisher.scores import FimScores
from .runtime.wrappers import unwrap_engine


def get_fim_scores(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: ForwardFn | None = None,
    adapter_name: str = "default",
    show_progress_bar: bool = True,
) -> FimScores:
    """The eFIM score of every layer that a LoRA adapter targets, without changing anything.

    Args:
        model: A model with a LoRA adapter, a module that holds such a model as a part, or a plain model together with
            `peft_config`. For a plain model no adapter is created, and the targets are those that PEFT would adapt.
        dataloader: Yields batches, see `initialize_lora_fim_ranks`.
        peft_config: Needed for a model without adapters. Its `fim_config` says how many batches to use; without
            one, the default of `FimConfig` applies.
        forward_fn: See `initialize_lora_fim_ranks`.
        adapter_name: The adapter whose layers are scored, if the model has adapters.
        show_progress_bar: Whether to show a progress bar.

    Returns:
        Layer name, as in the base model, to score.

    Raises:
        ValueError: If `peft_config` is missing, not a LoRA config or has `layer_replication` for a model without
            adapters; if the adapter does not exist or is in several parts of the model, nothing is targeted, or an
            adapter is merged; if `peft_config` awaits its ranks and PEFT does not have its initialization for a layer;
            if the dataloader is empty or its batches give no usable loss.
        RuntimeError: If no batch had finite gradients, the eFIM of every layer is zero, or another process failed.
        TypeError: If a layer's class is not supported, or the forward pass returns no loss.
    """
    model = unwrap_engine(model)
    if adapted_parts(model):
        part = adapted_part(model, adapter_name)
        config = peft_config or lora_config_of(part, adapter_name)
        layers = adapter_layers(part, adapter_name)
        with lora_layers_disabled(model, part):
            scores = calibrated_scores(model, layers, dataloader, config, forward_fn, show_progress_bar)
        return scores.for_targets(watched_adapter(part, adapter_name).converted_targets)
    if peft_config is None:
        raise ValueError("The model has no adapter: pass a LoraConfig as `peft_config` to say what to score.")
    if getattr(peft_config, "layer_replication", None):
        raise ValueError(
            "With layer_replication the layers exist only in the adapted model: call `get_peft_model` first and pass "
            "its result."
        )
    targets, converted = convert_targets(part_to_adapt(model), peft_config)
    scores = calibrated_scores(model, targets, dataloader, peft_config, forward_fn, show_progress_bar)
    return scores.for_targets(converted)


def calibrated_scores(
    model: nn.Module,
    layers: Mapping[str, TargetLayer | nn.Module],
    dataloader: Iterable[Any],
    config: LoraConfig,
    forward_fn: ForwardFn | None,
    show_progress_bar: bool,
    loss_communicates: bool = False,
    sequences_per_example: int = 1,
) -> FimScores:
    """Scores of `layers` by the `fim_config` of a config; see `calibrate` for the other arguments."""
    fim_config = getattr(config, "fim_config", None) or FimConfig()
    return calibrate(
        model,
        layers,
        NormSums.for_layers(layers, fim_config.exact),
        dataloader,
        fim_config.fim_calibration_batches,
        forward_fn,
        show_progress_bar,
        loss_communicates,
        sequences_per_example,
    )
