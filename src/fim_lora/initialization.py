"""The story from start to end: a model and batches, scores, ranks, a freshly initialised LoRA adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .calibration import ForwardFn, calibrate, forward_fn_default, frozen_in_eval_mode
from .config import FimConfig
from .distributed import gathered, together
from .estimator import FisherEstimator
from .eva_directions import eva_directions, require_eva
from .fisher_sums import NO_BATCH_SEEN
from .layer_types import target_layer
from .peft_integration import (
    adapter_layers,
    apply_allocation,
    awaits_ranks,
    convert_targets,
    converted_targets_of,
    estimator_of,
    final_initialisation,
    forget_estimator,
    lora_layers_disabled,
    name_in_base_model,
    require_resizable,
)
from .rank_allocation import RankAllocation, verify_patterns
from .scores import FimScores, LayerScore
from .wrappers import without_engine


def initialize_lora_fim_ranks(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    fim_scores: Mapping[str, LayerScore | float | Tensor] | None = None,
    forward_fn: ForwardFn | None = None,
    adapter_name: str = "default",
    show_progress_bar: bool = True,
) -> RankAllocation:
    """Decide the rank of every LoRA layer from the eFIM, and initialise the adapter at these ranks.

    The scores come from one of three sources: the backward passes of your own loop since `get_peft_model` (give
    neither `dataloader` nor `fim_scores`); a calibration run here over `dataloader`; or given `fim_scores`. With
    `fim_config.init_lora_weights="eva"` the `dataloader` is needed, and `fim_scores` may be given beside it.

    Afterwards the adapter is an ordinary LoRA adapter: `peft_config[adapter_name]` has no `fim_config`, the new
    `rank_pattern` and `alpha_pattern`, and `fim_config.init_lora_weights` as its initialisation. By default A is
    random and B is zero, as PEFT initialises each layer type, so the model's output is that of the base model; an
    adapter that was trained before starts anew. A layer of rank 0 (only with `r_min=0`) loses its adapter, and
    `target_modules` is updated, as with EVA. Dropout, bias, `modules_to_save`, other adapters, devices, dtypes and
    `requires_grad` stay.

    An optimizer that was built before the call stays valid: the same `nn.Parameter` objects carry the new tensors.
    If it has taken steps before, its state has the old shapes and its next step raises for every layer whose rank
    changed: build it, or let it take its first step, after the allocation.

    A call that raises leaves model and config as they were.

    Args:
        model: A model with a LoRA adapter that awaits allocation (`init_lora_weights="fim"`): a `PeftModel`, or a
            model with an injected adapter.
        dataloader: Yields batches (mapping, `BatchEncoding`, tuple or tensor), of which
            `fim_config.fim_calibration_batches` are used, in eval mode, with the LoRA layers disabled; trained
            `modules_to_save` stay in use, because they are part of the loss that will be trained.
        fim_scores: The result of `get_fim_scores`, or a mapping of layer name to a score or to an eFIM diagonal
            (a tensor of any shape, of which the mean is taken). Names may have the prefix `base_model.model.`.
        forward_fn: Takes model and batch and returns something with `.loss` or `["loss"]`, or a scalar loss. By
            default `model(**batch)`.
        adapter_name: The adapter.
        show_progress_bar: Whether to show the progress of a calibration over `dataloader`.

    Returns:
        Ranks, patterns, scores and counts.

    Raises:
        ValueError: If the adapter does not exist or does not await allocation; if both `dataloader` and
            `fim_scores` are given; if scores are missing, superfluous or invalid; if the bounds cannot be
            satisfied; if the dataloader is empty or its batches give no usable loss; if PEFT refuses the
            initialisation for a layer, or could not load the adapter without the layers of rank 0; if the model is
            wrapped, its adapter sharded, an adapter merged, or its config object that of another adapter; if the
            config asks for KaSA, BD-LoRA or Arrow; if `fim_scores` differ between processes; or if PiSSA or OLoRA
            would change an offloaded weight.
        RuntimeError: If no batch was seen, no batch had finite gradients, the eFIM of every layer is zero, or another
            process failed.
        TypeError: If a layer's class is not supported, the forward pass returns no loss, or PEFT cannot initialise a
            layer from a weight of its dtype.
    """
    config, layers, given = together(lambda: _checked(model, dataloader, fim_scores, adapter_name))
    with_eva = config.fim_config.init_lora_weights == "eva"
    own_loop = estimator_of(model, adapter_name)

    if given is not None:
        scores = given
    elif dataloader is not None:
        scores = _scores_of_adapter(model, layers, dataloader, config, forward_fn, show_progress_bar)
    else:
        scores = cast(FisherEstimator, own_loop).scores()

    allocation = RankAllocation.from_scores(scores, config)
    _require_same_ranks(allocation)
    base_config = copy.copy(config)
    base_config.init_lora_weights = final_initialisation(config)
    if with_eva:
        base_config.eva_config = None  # used up, and PEFT would warn of it whenever the adapter is loaded
    new_config = allocation.to_lora_config(base_config)
    verify_patterns(new_config, allocation)
    directions = None
    if with_eva:
        with lora_layers_disabled(model), frozen_in_eval_mode(model):
            directions = eva_directions(
                model,
                cast(Iterable[Any], dataloader),
                config,
                adapter_name,
                allocation.ranks,
                forward_fn or forward_fn_default,
                show_progress_bar,
            )
    apply_allocation(model, layers, adapter_name, allocation, new_config, directions)
    # In the config of this adapter they are converted; in another one that the ranks are written into they are not.
    converted = converted_targets_of(model, adapter_name)
    forget_estimator(model, adapter_name)
    return replace(allocation, scores=scores.for_targets(converted))


def _checked(
    model: nn.Module,
    dataloader: Iterable[Any] | None,
    fim_scores: Mapping[str, LayerScore | float | Tensor] | None,
    adapter_name: str,
) -> tuple[LoraConfig, Mapping[str, LoraLayer], FimScores | None]:
    """Config, layers and, if given, the scores; everything that can be refused before anything is run."""
    config = awaiting_config(model, adapter_name)
    _require_own_config(model, adapter_name, config)
    layers = adapter_layers(model, adapter_name)
    require_resizable(model, layers, config)
    with_eva = config.fim_config.init_lora_weights == "eva"
    if with_eva:
        require_eva(model, layers)
    if with_eva and dataloader is None:
        raise ValueError('init_lora_weights="eva" takes its directions from data: pass `dataloader`.')
    if not with_eva and dataloader is not None and fim_scores is not None:
        raise ValueError("Both `dataloader` and `fim_scores` were given: pass one of them.")
    if dataloader is None and fim_scores is None and estimator_of(model, adapter_name) is None:
        raise RuntimeError(NO_BATCH_SEEN)
    return config, layers, None if fim_scores is None else _given_scores(fim_scores, layers)


def _require_own_config(model: Any, adapter_name: str, config: LoraConfig) -> None:
    """The new ranks go into the config, and another adapter that holds the same object does not have them."""
    for name, other in model.peft_config.items():
        if other is config and name != adapter_name:
            raise ValueError(
                f"Adapter {name!r} was made from the same config object as {adapter_name!r}, which will hold the "
                f"ranks of {adapter_name!r} only: add {name!r} after the allocation, or with a copy of the config. "
                "TRL's DPOTrainer does this to a PeftModel: give it the plain model and the config as `peft_config`."
            )


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
        model: A model with a LoRA adapter, or a plain model together with `peft_config`; then no adapter is
            created, and the targets are those that PEFT would adapt.
        dataloader: Yields batches, see `initialize_lora_fim_ranks`.
        peft_config: Needed for a model without adapters. Its `fim_config` says how many batches to use; without
            one, the default of `FimConfig` holds.
        forward_fn: See `initialize_lora_fim_ranks`.
        adapter_name: The adapter whose layers are scored, if the model has adapters.
        show_progress_bar: Whether to show one.

    Returns:
        Layer name, as in the base model, to score.

    Raises:
        ValueError: If `peft_config` is missing, not a LoRA config or has `layer_replication` for a model without
            adapters; if the adapter does not exist, nothing is targeted, or an adapter is merged; if `peft_config`
            awaits its ranks and PEFT does not have its initialisation for a layer; if the dataloader is empty or
            its batches give no usable loss.
        RuntimeError: If no batch had finite gradients, the eFIM of every layer is zero, or another process failed.
        TypeError: If a layer's class is not supported, or the forward pass returns no loss.
    """
    model = without_engine(model)
    if hasattr(model, "peft_config"):
        config = peft_config or _lora_config(model, adapter_name)
        layers = adapter_layers(model, adapter_name)
        scores = _scores_of_adapter(model, layers, dataloader, config, forward_fn, show_progress_bar)
        return scores.for_targets(converted_targets_of(model, adapter_name))
    if peft_config is None:
        raise ValueError("The model has no adapter: pass a LoraConfig as `peft_config` to say what to score.")
    if getattr(peft_config, "layer_replication", None):
        raise ValueError(
            "With layer_replication the layers exist only in the adapted model: call `get_peft_model` first and pass "
            "its result."
        )
    targets, converted = convert_targets(model, peft_config)
    scores = _calibrated(model, targets, dataloader, peft_config, forward_fn, show_progress_bar)
    return scores.for_targets(converted)


def _scores_of_adapter(
    model: nn.Module,
    layers: Mapping[str, LoraLayer],
    dataloader: Iterable[Any],
    config: LoraConfig,
    forward_fn: ForwardFn | None,
    show_progress_bar: bool,
) -> FimScores:
    with lora_layers_disabled(model):
        return _calibrated(model, layers, dataloader, config, forward_fn, show_progress_bar)


def _calibrated(
    model: nn.Module,
    layers: Mapping[str, Any],
    dataloader: Iterable[Any],
    config: LoraConfig,
    forward_fn: ForwardFn | None,
    show_progress_bar: bool,
) -> FimScores:
    fim_config = getattr(config, "fim_config", None) or FimConfig()
    num_batches = fim_config.fim_calibration_batches
    return calibrate(model, layers, dataloader, num_batches, forward_fn, show_progress_bar, exact=fim_config.exact)


def _require_same_ranks(allocation: RankAllocation) -> None:
    """Only scores that were given can differ between processes; those from data are over the data of all."""
    for process, ranks in enumerate(gathered(lambda: allocation.ranks)):
        if ranks != allocation.ranks:
            name = min(name for name, _ in set(ranks.items()) ^ set(allocation.ranks.items()))
            raise ValueError(
                f"Process {process} would give layer {name!r} rank {ranks.get(name)}, this one "
                f"{allocation.ranks.get(name)}: pass the same `fim_scores` to every process."
            )


def _given_scores(given: Mapping[str, LayerScore | float | Tensor], layers: Mapping[str, LoraLayer]) -> FimScores:
    """Scores for exactly these layers, whatever form they were given in."""
    by_name = {name_in_base_model(name): score for name, score in given.items()}
    missing = [name for name in layers if name not in by_name]
    if missing:
        raise ValueError(f"`fim_scores` lacks {len(missing)} of {len(layers)} target layers: {missing}.")
    superfluous = [name for name in by_name if name not in layers]
    if superfluous:
        raise ValueError(
            f"`fim_scores` names {len(superfluous)} layers that the adapter does not target: {superfluous}. Leave "
            "them out, or target them."
        )
    scores = {name: _given_score(name, by_name[name], layer) for name, layer in layers.items()}
    if all(score.mean == 0 for score in scores.values()):
        raise ValueError("Every score in `fim_scores` is zero: there is nothing to allocate by.")
    counts = (given.num_batches, given.num_skipped_batches) if isinstance(given, FimScores) else (0, 0)
    return FimScores(scores, *counts)


def _given_score(name: str, score: LayerScore | float | Tensor, layer: nn.Module) -> LayerScore:
    if isinstance(score, LayerScore):
        return score
    mean = score.detach().double().mean().item() if isinstance(score, Tensor) else float(score)
    try:
        weight = target_layer(name, layer).weight
        shape = (weight.d_out, weight.d_in)
        return LayerScore(mean, None, 0, shape, weight.parameters_per_rank, weight.rank_step)
    except ValueError as error:
        raise ValueError(f"The score of layer {name!r} cannot be used: {error}") from error


def awaiting_config(model: nn.Module, adapter_name: str) -> LoraConfig:
    """The config of an adapter that waits for its ranks.

    Args:
        model: The model.
        adapter_name: The adapter.

    Returns:
        The config, which belongs to the model.

    Raises:
        ValueError: If there is no such adapter, or it does not wait.
    """
    config = _lora_config(model, adapter_name)
    if not awaits_ranks(config):
        raise ValueError(
            f"Adapter {adapter_name!r} does not await FIM allocation: it has init_lora_weights="
            f"{config.init_lora_weights!r}, which is also so after an allocation. Create it with "
            'LoraConfig(init_lora_weights="fim", fim_config=FimConfig(...)).'
        )
    return config


def _lora_config(model: nn.Module, adapter_name: str) -> LoraConfig:
    configs = getattr(model, "peft_config", None)
    if configs is None and without_engine(model) is not model:
        raise ValueError(
            f"The model is wrapped in {type(model).__name__}, which would go on with the parameters as they are now: "
            "pass `model.module` (Accelerate: `accelerator.unwrap_model(model)`), and wrap it again afterwards."
        )
    if configs is None:
        raise ValueError("The model has no adapter: call `get_peft_model(model, config)` first.")
    if adapter_name not in configs:
        raise ValueError(f"The model has no adapter {adapter_name!r}; it has {sorted(configs)}.")
    config = configs[adapter_name]
    if not isinstance(config, LoraConfig):
        raise ValueError(f"Adapter {adapter_name!r} is not a LoRA adapter but {type(config).__name__}.")
    return cast(LoraConfig, config)
