"""The methods that `quality.py` compares. The adapter of each method has at most as many parameters as uniform LoRA's.

Most methods compute a score for each layer, which determines its rank. Methods that differ only in their score share
everything else, including the allocation of fim-lora, so that only the scores are compared.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    EvaConfig,
    LoraConfig,
    LoraGAConfig,
    get_eva_state_dict,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.tuners.adalora.layer import RankAllocator
from peft.tuners.lora import LoraLayer, preprocess_loraga
from torch import nn

from fim_lora import FimConfig, FimScores, RankAllocation, get_fim_scores
from fim_lora.adapter.lora_layers import adapter_layers
from quality_tasks import Batch

SCALING = 2.0
"""`lora_alpha / r` of every layer, independent of its rank."""

PROPOSAL: dict[str, Any] = {"score": "mean", "budget": "rank"}
"""How the proposal to PEFT divides ranks: in proportion to the scores of all layers."""

_PERMUTATIONS = 2000
_SWAPS = 100_000


@dataclass(frozen=True)
class Setting:
    """The input of a method.

    Attributes:
        model: The pretrained model, which the method may modify.
        target_modules: Module names, as PEFT's `target_modules`.
        rank: Rank of uniform LoRA.
        task_type: PEFT's task type.
        calibration: Calibration batches from the training split.
        steps: Training steps, which AdaLoRA needs in its config.
        seed: Seed of the adapter's initial values.
    """

    model: Any
    target_modules: list[str]
    rank: int
    task_type: str
    calibration: list[Batch]
    steps: int
    seed: int

    def config(self, rank: int | None = None, **options: Any) -> LoraConfig:
        """A LoRA config for the target modules, by default with the rank of the setting."""
        r = rank or self.rank
        return LoraConfig(
            r=r, lora_alpha=round(SCALING * r), target_modules=self.target_modules, task_type=self.task_type, **options
        )

    def adapted(self, config: Any) -> Any:
        """The model with an adapter whose initial values depend on the seed."""
        torch.manual_seed(1000 + self.seed)
        return get_peft_model(self.model, config)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The loss of a batch."""
        loss: torch.Tensor = model(**batch).loss
        return loss


Method = Callable[[Setting], Any]


def _uniform(setting: Setting) -> Any:
    return setting.adapted(setting.config())


def _uniform_of_double_rank(setting: Setting) -> Any:
    return setting.adapted(setting.config(2 * setting.rank))


def by_scores(setting: Setting, scores: FimScores, **fim_options: Any) -> Any:
    """Adapt the model with ranks from scores, the scaling of uniform LoRA, and at most its number of parameters.

    Args:
        setting: The setting.
        scores: Scores of the target layers.
        **fim_options: Options of `FimConfig`. Without them ranks are divided as in the proposal to PEFT.

    Returns:
        The adapted model.
    """
    config = setting.config(init_lora_weights="fim", fim_config=FimConfig(**(PROPOSAL | fim_options)))
    allocation = _within_uniform(RankAllocation.from_scores(scores, config), config)
    return setting.adapted(allocation.to_lora_config(config))


def _within_uniform(allocation: RankAllocation, config: LoraConfig) -> RankAllocation:
    """Reduce the ranks of an allocation until it has at most as many parameters as uniform LoRA."""
    scores, ranks = allocation.scores, dict(allocation.ranks)
    limit = config.r * sum(scores.parameters_per_rank.values())
    while sum(rank * scores.parameters_per_rank[name] for name, rank in ranks.items()) > limit:
        # Reduce the layer whose score is the smallest per parameter of its adapter.
        score_per_parameter = {
            name: scores[name].mean / (rank * scores.parameters_per_rank[name])
            for name, rank in ranks.items()
            if rank > 1
        }
        ranks[min(score_per_parameter, key=lambda name: score_per_parameter[name])] -= 1
    return with_ranks(allocation, ranks)


def with_ranks(allocation: RankAllocation, ranks: dict[str, int]) -> RankAllocation:
    """Replace the ranks of an allocation, with the scaling of uniform LoRA."""
    return replace(allocation, ranks=ranks, alphas={name: SCALING * rank for name, rank in ranks.items()})


def _fim(**fim_options: Any) -> Method:
    return lambda setting: by_scores(setting, fim_scores(setting), **fim_options)


def fim_scores(setting: Setting, exact: bool = False) -> FimScores:
    """The eFIM scores of the target layers. The model is not changed.

    Args:
        setting: The setting.
        exact: Whether long examples are scored exactly instead of through a random projection.

    Returns:
        The scores.
    """
    fim_config = FimConfig(fim_calibration_batches=len(setting.calibration), exact=exact)
    config = setting.config(init_lora_weights="fim", fim_config=fim_config)
    return get_fim_scores(setting.model, setting.calibration, config, show_progress_bar=False)


def with_means(scores: FimScores, means: Mapping[str, float]) -> FimScores:
    """Replace the means of the scores."""
    changed = {name: replace(score, mean=means[name], standard_error=None) for name, score in scores.items()}
    return FimScores(changed, scores.num_batches)


def _random(setting: Setting) -> Any:
    """The ranks of `fim-parameters` on random layers: tests whether the scores matter, or only that ranks differ."""
    fim_config = FimConfig(**(PROPOSAL | {"budget": "parameters"}))
    config = setting.config(init_lora_weights="fim", fim_config=fim_config)
    allocation = RankAllocation.from_scores(fim_scores(setting), config)
    costs = allocation.scores.parameters_per_rank
    generator = random.Random(f"ranks {setting.seed}")
    ranks = ranks_on_other_layers(allocation.ranks, costs, config.r * sum(costs.values()), generator)
    return setting.adapted(with_ranks(allocation, ranks).to_lora_config(config))


def ranks_on_other_layers(
    ranks: Mapping[str, int], costs: Mapping[str, int], limit: int, generator: random.Random
) -> dict[str, int]:
    """Assign the same ranks to random layers, with a number of parameters below a limit and close to it.

    Args:
        ranks: Rank of each layer.
        costs: Parameters of one rank for each layer, in the same order.
        limit: Largest total number of parameters.
        generator: Random number generator.

    Returns:
        Rank of each layer: of many shuffles, the one with the most parameters within the limit. If none is within the
        limit, the last shuffle is changed by random swaps of two layers' ranks until it is.

    Raises:
        RuntimeError: If the swaps do not reach the limit.
    """
    best, most = list(ranks.values()), -1
    for _ in range(_PERMUTATIONS):
        shuffled = list(ranks.values())
        generator.shuffle(shuffled)
        size = _parameters(shuffled, costs.values())
        if most < size <= limit:
            best, most = shuffled, size
    if most < 0:
        best = _swapped(shuffled, list(costs.values()), limit, generator)
    if _parameters(best, costs.values()) > limit:
        layers = ", ".join(sorted(costs, key=lambda name: -costs[name])[:3])
        raise RuntimeError(
            f"No shuffle of the ranks {sorted(ranks.values())} of {len(ranks)} layers (the largest: {layers}) has at "
            f"most {limit} parameters: use another setting."
        )
    return dict(zip(costs, best, strict=True))


def _parameters(ranks: Iterable[int], costs: Iterable[int]) -> int:
    return sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))


def _swapped(ranks: Sequence[int], costs: Sequence[int], limit: int, generator: random.Random) -> list[int]:
    """Swap random pairs of ranks: first swaps that reduce the parameters to the limit, then swaps that increase them.

    Above the limit there is always a swap that reduces the parameters, unless no order of the ranks has fewer.
    """
    ranks = list(ranks)
    size = _parameters(ranks, costs)
    for _ in range(_SWAPS):
        one, other = generator.randrange(len(ranks)), generator.randrange(len(ranks))
        changed = size + (ranks[one] - ranks[other]) * (costs[other] - costs[one])
        if changed < size if size > limit else size <= changed <= limit:
            ranks[one], ranks[other], size = ranks[other], ranks[one], changed
    return ranks


def _inverse(setting: Setting) -> Any:
    scores = fim_scores(setting)
    least = min(mean for mean in scores.means.values() if mean > 0)
    means = {name: 1 / max(mean, least) for name, mean in scores.means.items()}
    return by_scores(setting, with_means(scores, means), budget="parameters")


def _gradient_of_lora_b(setting: Setting) -> Any:
    """The score of the published FIM-LoRA: the squared batch gradient of `lora_B`, averaged over batches."""
    model = setting.adapted(setting.config()).eval()
    layers: Mapping[str, Any] = adapter_layers(model, "default")
    means = dict.fromkeys(layers, 0.0)
    for batch in setting.calibration:
        model.zero_grad()
        setting.loss(model, batch).backward()
        for name, layer in layers.items():
            gradient = layer.lora_B["default"].weight.grad
            means[name] += gradient.square().mean().item() / len(setting.calibration)
    setting = replace(setting, model=model.unload())
    # One batch is enough: only the shapes and costs of these scores are used.
    shapes = fim_scores(replace(setting, calibration=setting.calibration[:1]))
    return by_scores(setting, with_means(shapes, means), budget="parameters")


def _eva(rho: float) -> Method:
    def adapter(setting: Setting) -> Any:
        # With the mask, EVA ignores tokens without a label. In classification, no token has one.
        eva = EvaConfig(rho=rho, use_label_mask=setting.task_type == "CAUSAL_LM", adjust_scaling_factors=True)
        config = setting.config(init_lora_weights="eva", eva_config=eva)
        model = setting.adapted(config).eval()
        directions = get_eva_state_dict(model, setting.calibration, show_progress_bar=False)
        initialize_lora_eva_weights(model, eva_state_dict=_truncated(directions, model, setting.rank))
        # EVA creates new weights for layers whose rank changed, in the precision of the model.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return model

    return adapter


def _truncated(directions: dict[str, Any], model: nn.Module, rank: int) -> dict[str, Any]:
    """Drop the last directions until the adapter has at most as many parameters as uniform LoRA.

    EVA preserves the sum of ranks, which can mean more parameters.
    """
    layers: Mapping[str, Any] = adapter_layers(model, "default")
    cost = {name: layer.in_features + layer.out_features for name, layer in layers.items()}
    by_name = {name.removeprefix("base_model.model."): name for name in directions}
    ranks = {name: len(directions[by_name[name]]) if name in by_name else 0 for name in layers}
    while sum(ranks[name] * cost[name] for name in ranks) > rank * sum(cost.values()):
        ranks[max(ranks, key=lambda name: (ranks[name], cost[name]))] -= 1
    return {full: directions[full][: ranks[name]] for name, full in by_name.items()}


class _AllocatorWithinUniform(RankAllocator):  # type: ignore[misc]
    """AdaLoRA's allocator with a limit on parameters: it counts ranks, and drops more of them at the end if needed.

    Attributes:
        max_parameters: Largest number of adapter parameters.
    """

    max_parameters: int

    def mask_to_budget(self, model: nn.Module, budget: int) -> Any:
        rank_pattern = super().mask_to_budget(model, budget)
        while budget <= self.target_bgt and adapter_parameters(model) > self.max_parameters:
            budget -= 1
            rank_pattern = super().mask_to_budget(model, budget)
        return rank_pattern


def _adalora(setting: Setting) -> Any:
    """AdaLoRA that starts at 1.5 times the rank and ends with at most as many parameters as uniform LoRA."""
    return adalora_from(setting, max(setting.rank + 1, round(1.5 * setting.rank)))


def adalora_from(setting: Setting, init_r: int) -> Any:
    """Adapt the model with AdaLoRA that starts at rank `init_r` in every layer."""
    config = AdaLoraConfig(
        init_r=init_r,
        target_r=setting.rank,
        lora_alpha=round(SCALING * init_r),
        tinit=setting.steps // 10,
        tfinal=setting.steps // 2,
        deltaT=2,
        total_step=setting.steps,
        target_modules=setting.target_modules,
        task_type=setting.task_type,
    )
    model = setting.adapted(config)
    # `ranknum` counts ranks and must not be trained, but PEFT makes it trainable when it casts it to float32.
    for name, parameter in model.named_parameters():
        if "ranknum" in name:
            parameter.requires_grad_(False)
    allocator = model.base_model.rankallocator
    allocator.__class__ = _AllocatorWithinUniform  # a copy of the model would share a closure
    allocator.max_parameters = adapter_parameters(model) * setting.rank // init_r
    return model


def _lora_ga(setting: Setting) -> Any:
    config = setting.config(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    # LoRA-GA makes the weights trainable to read their gradients; the flags are restored afterward.
    requires_grad = {name: parameter.requires_grad for name, parameter in setting.model.named_parameters()}

    def backward() -> None:
        for batch in setting.calibration:
            setting.loss(setting.model, batch).backward()

    preprocess_loraga(setting.model.eval(), config, backward)
    setting.model.zero_grad()
    for name, parameter in setting.model.named_parameters():
        parameter.requires_grad_(requires_grad.get(name, False))
    return setting.adapted(config)


METHODS: dict[str, Method] = {
    "uniform": _uniform,
    "fim-rank": _fim(),
    "fim-parameters": _fim(budget="parameters"),
    "fim-parameters-1/2": _fim(budget="parameters", score_exponent=0.5),
    "fim-parameters-1/3": _fim(budget="parameters", score_exponent=1 / 3),
    "random": _random,
    "inverse": _inverse,
    "lora_B-gradient": _gradient_of_lora_b,
    "eva-rho-1": _eva(1.0),
    "eva-rho-2": _eva(2.0),
    "adalora": _adalora,
    "lora-ga": _lora_ga,
    "uniform-double-rank": _uniform_of_double_rank,
}
"""The methods by name. The first is the reference, the last an upper reference with twice the parameters."""

REFERENCE, UPPER_REFERENCE = "uniform", "uniform-double-rank"


def adapter_parameters(model: nn.Module) -> int:
    """Number of adapter parameters in use, without the classifier.

    For AdaLoRA, these are the parameters of the ranks it keeps, without the singular values. Before its first step
    all singular values are zero, and all ranks count.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if any("default" in getattr(layer, "lora_E", {}) for layer in layers):
        costs = {layer.lora_E["default"]: layer.in_features + layer.out_features for layer in layers}
        kept = sum(int((values != 0).sum()) * cost for values, cost in costs.items())
        return kept or sum(values.numel() * cost for values, cost in costs.items())
    weights = [
        linear["default"].weight for layer in layers for linear in (layer.lora_A, layer.lora_B) if "default" in linear
    ]
    return sum(weight.numel() for weight in weights)
