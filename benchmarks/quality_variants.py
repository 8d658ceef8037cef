"""Variants of FIM ranks, which are the evidence for the defaults of the library. Each variant changes one thing.

All variants have a parameter budget and the exponent 1 unless their name says otherwise, and at most as many
parameters as uniform LoRA. Compare them with `fim-parameters` of `quality_methods.py`.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fim_lora import FimConfig, FimScores, RankAllocation, allocate_ranks
from fim_lora.ranks.layer_grid import layer_grids
from quality_methods import (
    PROPOSAL,
    SCALING,
    Method,
    Setting,
    adalora_from,
    by_scores,
    fim_scores,
    with_means,
    with_ranks,
)

HEAD_WARM_UP_ROUNDS = 5
"""Passes over the calibration batches in the warm-up of a new classifier."""

_HEAD_LEARNING_RATE = 1e-2


# --- The scaling of a layer whose rank changed ------------------------------------------------------------------


def proposed_allocation(setting: Setting, **fim_options: Any) -> tuple[RankAllocation, Any]:
    """The allocation as in the proposal, with a parameter budget and these options, and the config it belongs to."""
    fim_config = FimConfig(**(PROPOSAL | {"budget": "parameters"} | fim_options))
    config = setting.config(init_lora_weights="fim", fim_config=fim_config)
    return RankAllocation.from_scores(fim_scores(setting), config), config


def _scaled(power: float, **fim_options: Any) -> Method:
    """Multiply the scaling of each layer by `(r / r_i) ** power`."""

    def adapter(setting: Setting) -> Any:
        allocation, config = proposed_allocation(setting, **fim_options)
        alphas = {name: SCALING * rank * (setting.rank / rank) ** power for name, rank in allocation.ranks.items()}
        return setting.adapted(replace(allocation, alphas=alphas).to_lora_config(config))

    return adapter


def _uniform_with_scaling_by_rank(setting: Setting) -> Any:
    """The other half of a reallocation: every layer has rank r, and its scaling is multiplied by `r_i / r`."""
    allocation, config = proposed_allocation(setting)
    alphas = {name: SCALING * rank for name, rank in allocation.ranks.items()}
    uniform = dict.fromkeys(allocation.ranks, setting.rank)
    return setting.adapted(replace(allocation, ranks=uniform, alphas=alphas).to_lora_config(config))


# --- The bounds --------------------------------------------------------------------------------------------------


def _bounded(factor: int) -> Method:
    """Set `r_max` to `factor * r`."""
    return lambda setting: by_scores(setting, fim_scores(setting), budget="parameters", r_max=factor * setting.rank)


# --- The score ---------------------------------------------------------------------------------------------------


def _sum_over_entries(score_exponent: float = 1.0) -> Method:
    """Score by the sum over the entries of the weight instead of the mean; the exponent 1/2 gives the norm."""

    def adapter(setting: Setting) -> Any:
        power_of_norm = 2 * score_exponent
        scores = fim_scores(setting)
        return by_scores(setting, scores, score="norm", budget="parameters", score_exponent=power_of_norm)

    return adapter


def _within_kinds(score_exponent: float) -> Method:
    """Divide the budget of each kind of layer, such as `q_proj`, among the depths; kinds keep their budgets."""

    def adapter(setting: Setting) -> Any:
        allocation, config = proposed_allocation(setting)
        ranks: dict[str, int] = {}
        for grid in layer_grids(allocation.scores):
            for kind in grid.kinds:
                names = [name for (_, column), name in grid.cells.items() if column == kind]
                means = {name: allocation.scores.means[name] for name in names}
                ranks |= allocate_ranks(means, setting.rank, score_exponent=score_exponent)
        ranks = {name: ranks[name] for name in allocation.ranks}
        return setting.adapted(with_ranks(allocation, ranks).to_lora_config(config))

    return adapter


def _upper_half(setting: Setting) -> Any:
    """Twice the rank in the upper half of the blocks, which alone needs a backward pass."""
    depth = setting.model.config.num_hidden_layers
    upper = list(range(depth // 2, depth))
    return setting.adapted(setting.config(2 * setting.rank, layers_to_transform=upper))


@contextmanager
def _weights_with_gradients(model: Any, names: Any) -> Iterator[dict[str, nn.Parameter]]:
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    training = model.training
    weights = {name: model.get_submodule(name).weight for name in names}
    model.eval().requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    yield weights
    for parameter, required in before.items():
        parameter.requires_grad_(required)
        parameter.grad = None
    model.train(training)


def batch_gradients(setting: Setting, names: Any) -> Iterator[dict[str, Tensor]]:
    """Yield, for each calibration batch, the gradients of the weights of the named layers.

    Each gradient (d_out × d_in, float32) is that of the mean loss of the batch. The model is restored afterward.
    """
    with _weights_with_gradients(setting.model, names) as weights:
        for batch in setting.calibration:
            setting.loss(setting.model, batch).backward()
            gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
            yield {name: gradient.to(torch.float32, copy=True) for name, gradient in gradients.items()}
            setting.model.zero_grad()


def batch_means(setting: Setting, scores: FimScores) -> dict[str, float]:
    """For each layer in `scores`: mean over entries and calibration batches of the squared batch gradient."""
    means = dict.fromkeys(scores, 0.0)
    for gradients in batch_gradients(setting, list(scores)):
        for name, gradient in gradients.items():
            means[name] += gradient.square().mean().item() / len(setting.calibration)
    return means


def _batch_gradients(setting: Setting) -> Any:
    scores = fim_scores(setting)
    return by_scores(setting, with_means(scores, batch_means(setting, scores)), budget="parameters")


@contextmanager
def warm_head(setting: Setting) -> Iterator[None]:
    """Train only the new `classifier` of the model on the calibration batches, and restore it after the block."""
    head = setting.model.classifier
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    optimizer = torch.optim.AdamW(head.parameters(), lr=_HEAD_LEARNING_RATE, weight_decay=0.0)
    setting.model.eval()
    for batch in setting.calibration * HEAD_WARM_UP_ROUNDS:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        with torch.no_grad():
            pooled = setting.model.base_model(**inputs).pooler_output
        nn.functional.cross_entropy(head(pooled), batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    yield
    head.load_state_dict(before)


def _after_head_warm_up(setting: Setting) -> Any:
    with warm_head(setting):
        scores = fim_scores(setting)
    return by_scores(setting, scores, budget="parameters")


# --- The marginal value of the k-th rank -------------------------------------------------------------------------


def greedy_ranks(gains: Mapping[str, list[float]], costs: Mapping[str, int], limit: int) -> dict[str, int]:
    """Assign ranks one by one, each to the layer with the largest gain per parameter.

    Args:
        gains: For each layer, the gains of its first, second, … rank in non-increasing order, up to its largest rank.
        costs: Parameters of one rank for each layer.
        limit: Largest total number of parameters.

    Returns:
        Rank of each layer, at least 1. Parameters that are too few for another rank are not used.
    """
    ranks = dict.fromkeys(gains, 1)
    left = limit - sum(costs.values())
    queue = [(-values[1] / costs[name], name) for name, values in gains.items() if len(values) > 1]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        if costs[name] > left:
            continue
        ranks[name] += 1
        left -= costs[name]
        if ranks[name] < len(gains[name]):
            heapq.heappush(queue, (-gains[name][ranks[name]] / costs[name], name))
    return ranks


def _spectrum(setting: Setting) -> Any:
    """Greedy ranks; the gain of the k-th rank is the square of the k-th singular value of the mean gradient."""
    allocation, config = proposed_allocation(setting)
    scores = allocation.scores
    total: dict[str, Tensor] = {}
    for gradients in batch_gradients(setting, list(scores)):
        for name, gradient in gradients.items():
            total[name] = total.get(name, 0) + gradient
    max_rank = 4 * setting.rank
    gains = {name: torch.linalg.svdvals(total[name].float())[:max_rank].square().tolist() for name in scores}
    limit = setting.rank * sum(scores.parameters_per_rank.values())
    ranks = greedy_ranks(gains, scores.parameters_per_rank, limit)
    return setting.adapted(with_ranks(allocation, ranks).to_lora_config(config))


def _adalora_with_uniform_ranks(setting: Setting) -> Any:
    """AdaLoRA's adapter, a diagonal between two random matrices, with fixed ranks."""
    model = adalora_from(setting, setting.rank)
    model.base_model.update_and_allocate = _keep_ranks  # PEFT's method cannot keep all ranks
    return model


def _keep_ranks(step: int) -> None:
    pass


VARIANTS: dict[str, Method] = {
    "fim-scaling-sqrt": _scaled(0.5),
    "fim-scaling-not-adjusted": _scaled(1.0),
    "fim-1/2-scaling-sqrt": _scaled(0.5, score_exponent=0.5),
    "uniform-scaling-by-rank": _uniform_with_scaling_by_rank,
    "fim-r_max-2r": _bounded(2),
    "fim-r_max-8r": _bounded(8),
    "fim-sum": _sum_over_entries(),
    "fim-sum-1/2": _sum_over_entries(0.5),
    "fim-sum-1/3": _sum_over_entries(1 / 3),
    "fim-kind": _within_kinds(1.0),
    "fim-kind-1/2": _within_kinds(0.5),
    "upper-half": _upper_half,
    "fim-batch-gradients": _batch_gradients,
    "fim-warm-head": _after_head_warm_up,
    "fim-spectrum": _spectrum,
    "adalora-uniform-ranks": _adalora_with_uniform_ranks,
}
"""The variants by name."""
