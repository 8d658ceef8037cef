"""`initialize_lora_fim_ranks`: from a model and batches to scores, ranks and a freshly initialized LoRA adapter."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .adapter.adapted_part import adapted_part
from .adapter.checks import require_resizable, require_untrained
from .adapter.eva_directions import eva_directions, require_eva
from .adapter.lora_layers import adapter_layers, name_in_base_model
from .adapter.pending_config import awaiting_config, final_initialization, require_own_config
from .adapter.resize import Factors, require_same_ranks, resize_adapter
from .adapter.watching import NormRecorder, lora_layers_disabled, stop_watching, watched_adapter
from .fisher.calibration import ForwardFn, forward_fn_default
from .fisher.coverage import NO_BATCH_SEEN
from .fisher.layers.registry import target_layer
from .fisher.scores import FimScores, LayerScore
from .rank_allocation import RankAllocation
from .runtime.distributed import run_on_all
from .runtime.flags import frozen_eval_mode
from .runtime.unfinished_dataloaders import unfinished_dataloaders_ended
from .scoring import calibrated_scores


def initialize_lora_fim_ranks(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    fim_scores: Mapping[str, LayerScore | float | Tensor] | None = None,
    forward_fn: ForwardFn | None = None,
    adapter_name: str = "default",
    show_progress_bar: bool = True,
    discard_weights: bool = False,
) -> RankAllocation:
    """Decide the rank of every LoRA layer from the eFIM, and initialize the adapter at these ranks.

    The scores come from one of three sources: the backward passes of your own loop since `get_peft_model` (pass
    neither `dataloader` nor `fim_scores`); a calibration over `dataloader`, which this function runs; or `fim_scores`.
    With `fim_config.init_lora_weights="eva"` the `dataloader` is needed, and `fim_scores` may be passed in addition.

    Afterward, the adapter is an ordinary LoRA adapter: `peft_config[adapter_name]` has no `fim_config`, the new
    `rank_pattern` and `alpha_pattern`, and `fim_config.init_lora_weights` as its initialization. By default A is
    random and B is zero, as PEFT initializes each layer type, so the model's output is that of the base model. A layer
    of rank 0 (only with `r_min=0`) loses its adapter, and `target_modules` is updated, as with EVA. Dropout, bias,
    `modules_to_save`, other adapters, devices, dtypes and `requires_grad` do not change.

    An optimizer that was built before the call stays valid: the same `nn.Parameter` objects carry the new tensors.
    If it has taken steps before, its state has the old shapes, and its next step raises for every layer whose rank
    changed: build it, or let it take its first step, after the allocation.

    A call that raises leaves the model and its config as they were.

    Args:
        model: A model with a LoRA adapter that awaits allocation (`init_lora_weights="fim"`): a `PeftModel`, a model
            with an injected adapter, or a module that holds one of these, such as a `SentenceTransformer` or a
            `LightningModule`. In the last case, layers are named as in the part that was adapted, and the whole
            module is calibrated.
        dataloader: Yields batches (mapping, `BatchEncoding`, tuple or tensor), of which
            `fim_config.fim_calibration_batches` are used, in eval mode, with the LoRA layers disabled. Trained
            `modules_to_save` stay in use, because they are part of the loss that will be trained.
        fim_scores: The result of `get_fim_scores`, or a mapping of layer name to the mean of an eFIM diagonal, or to
            the diagonal (a tensor of any shape, whose mean is used). Names may have the prefix `base_model.model.`.
            Ranks are proportional to the given numbers with `FimConfig(score="mean")`, and by default to the root of
            their product with the number of entries.
        forward_fn: Takes model and batch and returns something with `.loss` or `["loss"]`, or a scalar loss. By
            default `model(**batch)`.
        adapter_name: The adapter.
        show_progress_bar: Whether to show the progress of a calibration over `dataloader`.
        discard_weights: Whether an adapter that was trained, or whose weights were loaded, starts from scratch.

    Returns:
        Ranks, patterns, scores and counts.

    Raises:
        ValueError: If the adapter does not exist, is in several parts of the model, or does not await allocation; if
            it was trained before, and `discard_weights` is not set; if both `dataloader` and `fim_scores` are given;
            if scores are missing, superfluous or invalid; if the bounds cannot be satisfied; if the dataloader is
            empty or its batches give no usable loss; if PEFT refuses the initialization for a layer, or could not
            load the adapter without the layers of rank 0; if the model is wrapped, its adapter sharded, an adapter
            merged, or its config object that of another adapter; if the config uses KaSA, BD-LoRA or Arrow; if
            `fim_scores` differ between processes; or if PiSSA or OLoRA would change an offloaded weight.
        RuntimeError: If no batch was seen, no batch had finite gradients, the eFIM of every layer is zero, or another
            process failed.
        TypeError: If a layer's class is not supported, the forward pass returns no loss, or PEFT cannot initialize a
            layer from a weight of its dtype.
    """
    part = run_on_all(lambda: adapted_part(model, adapter_name))
    config, layers, given = run_on_all(lambda: _checked(part, dataloader, fim_scores, adapter_name, discard_weights))
    pending = watched_adapter(part, adapter_name)
    converted = pending.converted_targets
    if given is not None:
        scores = given
    elif dataloader is not None:
        with lora_layers_disabled(model, part):
            scores = calibrated_scores(model, layers, dataloader, config, forward_fn, show_progress_bar)
    else:
        scores = cast(NormRecorder, pending.recorder).result()

    allocation = RankAllocation.from_scores(scores, config)
    # Only passed scores can differ between processes; measured ones are over the data of all processes.
    require_same_ranks(allocation.ranks, "the same `fim_scores`")
    new_config = allocation.to_lora_config(_final_config(config))
    factors = {}
    if _uses_eva(config):
        batches, run = cast(Iterable[Any], dataloader), _on_whole(model, forward_fn or forward_fn_default)
        with unfinished_dataloaders_ended(), lora_layers_disabled(model, part), frozen_eval_mode(model):
            directions = eva_directions(
                part, layers, adapter_name, allocation.ranks, config, batches, run, show_progress_bar
            )
        factors = {name: (Factors(a),) for name, a in directions.items()}
    resize_adapter(part, layers, adapter_name, allocation.ranks, allocation.alphas, new_config, factors)
    stop_watching(part, adapter_name)
    # The config of this adapter has the converted targets. Another config that the ranks are written into does not.
    return replace(allocation, scores=scores.for_targets(converted))


def _checked(
    model: nn.Module,
    dataloader: Iterable[Any] | None,
    fim_scores: Mapping[str, LayerScore | float | Tensor] | None,
    adapter_name: str,
    discard_weights: bool,
) -> tuple[LoraConfig, Mapping[str, LoraLayer], FimScores | None]:
    """Check the arguments before anything runs; return the config, the layers and the passed scores."""
    config = awaiting_config(model, adapter_name)
    require_own_config(model, adapter_name, config)
    layers = adapter_layers(model, adapter_name)
    require_resizable(model, layers, config)
    if not discard_weights:
        require_untrained(layers, adapter_name)
    with_eva = _uses_eva(config)
    if with_eva:
        require_eva(model, layers)
    if with_eva and dataloader is None:
        raise ValueError('init_lora_weights="eva" computes its directions from data: pass `dataloader`.')
    if not with_eva and dataloader is not None and fim_scores is not None:
        raise ValueError("Both `dataloader` and `fim_scores` were given: pass one of them.")
    if dataloader is None and fim_scores is None and watched_adapter(model, adapter_name).recorder is None:
        raise RuntimeError(NO_BATCH_SEEN)
    return config, layers, None if fim_scores is None else _checked_scores(fim_scores, layers)


def _checked_scores(given: Mapping[str, LayerScore | float | Tensor], layers: Mapping[str, LoraLayer]) -> FimScores:
    """The passed scores as `FimScores`. Raises `ValueError` unless they are valid, for these layers, not all zero."""
    by_name = {name_in_base_model(name): score for name, score in given.items()}
    missing = [name for name in layers if name not in by_name]
    if missing:
        raise ValueError(
            f"`fim_scores` lacks {len(missing)} of {len(layers)} target layers: {missing}. Pass a score for each."
        )
    superfluous = [name for name in by_name if name not in layers]
    if superfluous:
        raise ValueError(
            f"`fim_scores` names {len(superfluous)} layers that the adapter does not target: {superfluous}. Leave "
            "them out, or target them."
        )
    scores = {name: _checked_score(name, by_name[name], layer) for name, layer in layers.items()}
    if all(score.mean == 0 for score in scores.values()):
        raise ValueError("Every score in `fim_scores` is zero, so ranks cannot be allocated: pass measured scores.")
    counts = (given.num_batches, given.num_skipped_batches) if isinstance(given, FimScores) else (0, 0)
    return FimScores(scores, *counts)


def _checked_score(name: str, score: LayerScore | float | Tensor, layer: LoraLayer) -> LayerScore:
    if isinstance(score, LayerScore):
        _require_same_layer(name, score, _score_of(name, layer, 0.0))
        return score
    mean = score.detach().cpu().double().mean().item() if isinstance(score, Tensor) else float(score)
    try:
        return _score_of(name, layer, mean)
    except ValueError as error:
        raise ValueError(f"The score of layer {name!r} cannot be used: {error}") from error


def _score_of(name: str, layer: LoraLayer, mean: float) -> LayerScore:
    """A score that was not measured, for a layer of this form."""
    weight = target_layer(name, layer).weight_shape
    return LayerScore(
        mean,
        None,
        num_examples=0,
        shape=(weight.d_out, weight.d_in),
        parameters_per_rank=weight.parameters_per_rank,
        rank_step=weight.rank_step,
        num_entries=weight.num_entries,
    )


def _require_same_layer(name: str, score: LayerScore, expected: LayerScore) -> None:
    for field in ("shape", "parameters_per_rank", "rank_step", "num_entries"):
        if getattr(score, field) != getattr(expected, field):
            raise ValueError(
                f"The score of layer {name!r} was measured on another layer: its {field} is {getattr(score, field)}, "
                f"and that of this model is {getattr(expected, field)}. Measure the scores on this model, or pass "
                "`scores.means`."
            )


def _uses_eva(config: LoraConfig) -> bool:
    return config.fim_config.init_lora_weights == "eva"


def _on_whole(model: nn.Module, forward_fn: ForwardFn) -> ForwardFn:
    """A forward function that runs the whole model, whatever part of it it is called with."""
    return lambda _, batch: forward_fn(model, batch)


def _final_config(config: LoraConfig) -> LoraConfig:
    config = copy.copy(config)
    if _uses_eva(config):
        config.eva_config = None  # no longer needed, and PEFT would warn about it whenever the adapter is loaded
    config.init_lora_weights = final_initialization(config)
    return config
