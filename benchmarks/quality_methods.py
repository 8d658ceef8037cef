"""The methods that `quality.py` compares: each makes an adapter that has no more parameters than uniform LoRA's.

What decides over ranks is a score of every layer. Methods that differ in their score alone share everything else, the
allocation of fim-lora included, so that the comparison is about the score.
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
from fim_lora.peft_integration import adapter_layers
from quality_tasks import Batch

SCALING = 2.0
"""`lora_alpha / r` of every layer, whatever its rank."""

_PERMUTATIONS = 2000
_SWAPS = 100_000


@dataclass(frozen=True)
class Setting:
    """What a method works on.

    Attributes:
        model: The pretrained model. A method takes it over.
        target_modules: Module names, as PEFT's `target_modules`.
        rank: Rank of uniform LoRA.
        task_type: PEFT's.
        calibration: Batches of the training split.
        steps: Training steps, which AdaLoRA has to know.
        seed: Decides the values of the adapter.
    """

    model: Any
    target_modules: list[str]
    rank: int
    task_type: str
    calibration: list[Batch]
    steps: int
    seed: int

    def config(self, rank: int | None = None, **options: Any) -> LoraConfig:
        """A LoRA config for the targets."""
        r = rank or self.rank
        return LoraConfig(
            r=r, lora_alpha=round(SCALING * r), target_modules=self.target_modules, task_type=self.task_type, **options
        )

    def adapted(self, config: Any) -> Any:
        """The model with an adapter, whose values are those of the seed."""
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
    """An adapter with ranks by some scores, the scaling of uniform LoRA, and no more parameters.

    Args:
        setting: The setting.
        scores: Of its targets.
        **fim_options: Of `FimConfig`.

    Returns:
        The adapted model.
    """
    config = setting.config(init_lora_weights="fim", fim_config=FimConfig(**fim_options))
    allocation = _within_uniform(RankAllocation.from_scores(scores, config), config)
    return setting.adapted(allocation.to_lora_config(config))


def _within_uniform(allocation: RankAllocation, config: LoraConfig) -> RankAllocation:
    """Of an allocation with a rank budget that has more parameters than uniform LoRA, one with a smaller budget."""
    scores, ranks = allocation.scores, dict(allocation.ranks)
    limit = config.r * sum(scores.parameters_per_rank.values())
    while sum(rank * scores.parameters_per_rank[name] for name, rank in ranks.items()) > limit:
        # The rank of which the score pays the least for its parameters.
        worth = {
            name: scores[name].mean / (rank * scores.parameters_per_rank[name])
            for name, rank in ranks.items()
            if rank > 1
        }
        ranks[min(worth, key=lambda name: worth[name])] -= 1
    return with_ranks(allocation, ranks)


def with_ranks(allocation: RankAllocation, ranks: dict[str, int]) -> RankAllocation:
    """An allocation with other ranks and the scaling of uniform LoRA."""
    return replace(allocation, ranks=ranks, alphas={name: SCALING * rank for name, rank in ranks.items()})


def _fim(**fim_options: Any) -> Method:
    return lambda setting: by_scores(setting, fim_scores(setting), **fim_options)


def fim_scores(setting: Setting, exact: bool = False) -> FimScores:
    """The eFIM of the targets.

    Args:
        setting: The setting; its model is not changed.
        exact: Whether long examples are read exactly, too.

    Returns:
        The scores.
    """
    fim_config = FimConfig(fim_calibration_batches=len(setting.calibration), exact=exact)
    config = setting.config(init_lora_weights="fim", fim_config=fim_config)
    return get_fim_scores(setting.model, setting.calibration, config, show_progress_bar=False)


def with_means(scores: FimScores, means: Mapping[str, float]) -> FimScores:
    """Other scores of the same layers."""
    changed = {name: replace(score, mean=means[name], standard_error=None) for name, score in scores.items()}
    return FimScores(changed, scores.num_batches)


def _random(setting: Setting) -> Any:
    """The ranks of `fim-parameters`, on other layers: whether the signal matters, or only that ranks differ."""
    config = setting.config(init_lora_weights="fim", fim_config=FimConfig(budget="parameters"))
    allocation = RankAllocation.from_scores(fim_scores(setting), config)
    costs = allocation.scores.parameters_per_rank
    draw = random.Random(f"ranks {setting.seed}")
    ranks = ranks_on_other_layers(allocation.ranks, costs, config.r * sum(costs.values()), draw)
    return setting.adapted(with_ranks(allocation, ranks).to_lora_config(config))


def ranks_on_other_layers(
    ranks: Mapping[str, int], costs: Mapping[str, int], limit: int, draw: random.Random
) -> dict[str, int]:
    """Give the same ranks to random layers, within a number of parameters and near it.

    Args:
        ranks: Layer to rank.
        costs: Layer to parameters of one rank, of the same layers in the same order.
        limit: Parameters in all.
        draw: Where chance comes from.

    Returns:
        The shuffle with the most parameters within the limit. Where none of many is within it, random swaps of two
        layers' ranks lead there from the last one.

    Raises:
        RuntimeError: If they do not.
    """
    best, most = list(ranks.values()), -1
    for _ in range(_PERMUTATIONS):
        shuffled = list(ranks.values())
        draw.shuffle(shuffled)
        size = _parameters(shuffled, costs.values())
        if most < size <= limit:
            best, most = shuffled, size
    if most < 0:
        best = _swapped(shuffled, list(costs.values()), limit, draw)
    if _parameters(best, costs.values()) > limit:
        layers = ", ".join(sorted(costs, key=lambda name: -costs[name])[:3])
        raise RuntimeError(
            f"The ranks {sorted(ranks.values())} of {len(ranks)} layers (the largest: {layers}) were on no other "
            f"layers within {limit} parameters."
        )
    return dict(zip(costs, best, strict=True))


def _parameters(ranks: Iterable[int], costs: Iterable[int]) -> int:
    return sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))


def _swapped(ranks: Sequence[int], costs: Sequence[int], limit: int, draw: random.Random) -> list[int]:
    """Random swaps of two ranks that lower the parameters to the limit, and then raise them within it.

    Above the limit there is always a swap that lowers them, unless no order of the ranks has fewer.
    """
    ranks = list(ranks)
    size = _parameters(ranks, costs)
    for _ in range(_SWAPS):
        one, other = draw.randrange(len(ranks)), draw.randrange(len(ranks))
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
    """The published FIM-LoRA: the squared gradient of `lora_B`, of the whole batch, averaged over batches."""
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
    # Shapes and costs are those of the same layers.
    shapes = fim_scores(replace(setting, calibration=setting.calibration[:1]))
    return by_scores(setting, with_means(shapes, means), budget="parameters")


def _eva(rho: float) -> Method:
    def adapter(setting: Setting) -> Any:
        # It takes tokens without a label for padding, and a class has no token.
        eva = EvaConfig(rho=rho, use_label_mask=setting.task_type == "CAUSAL_LM", adjust_scaling_factors=True)
        config = setting.config(init_lora_weights="eva", eva_config=eva)
        model = setting.adapted(config).eval()
        directions = get_eva_state_dict(model, setting.calibration, show_progress_bar=False)
        initialize_lora_eva_weights(model, eva_state_dict=_truncated(directions, model, setting.rank))
        # Of a layer whose rank it changed it makes new weights, in the precision of the model.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return model

    return adapter


def _truncated(directions: dict[str, Any], model: nn.Module, rank: int) -> dict[str, Any]:
    """EVA keeps the sum of ranks. Where that is more parameters than uniform LoRA has, the last directions go."""
    layers: Mapping[str, Any] = adapter_layers(model, "default")
    cost = {name: layer.in_features + layer.out_features for name, layer in layers.items()}
    by_name = {name.removeprefix("base_model.model."): name for name in directions}
    ranks = {name: len(directions[by_name[name]]) if name in by_name else 0 for name in layers}
    while sum(ranks[name] * cost[name] for name in ranks) > rank * sum(cost.values()):
        ranks[max(ranks, key=lambda name: (ranks[name], cost[name]))] -= 1
    return {full: directions[full][: ranks[name]] for name, full in by_name.items()}


class _AllocatorWithinUniform(RankAllocator):  # type: ignore[misc]
    """AdaLoRA's, which counts ranks, and at the end drops more of them until it has no more parameters than allowed.

    Attributes:
        most_parameters: The parameters allowed.
    """

    most_parameters: int

    def mask_to_budget(self, model: nn.Module, budget: int) -> Any:
        rank_pattern = super().mask_to_budget(model, budget)
        while budget <= self.target_bgt and adapter_parameters(model) > self.most_parameters:
            budget -= 1
            rank_pattern = super().mask_to_budget(model, budget)
        return rank_pattern


def _adalora(setting: Setting) -> Any:
    """It starts at 1.5 times the rank and ends at uniform LoRA's parameters."""
    return adalora_from(setting, max(setting.rank + 1, round(1.5 * setting.rank)))


def adalora_from(setting: Setting, init_r: int) -> Any:
    """AdaLoRA that begins with some rank everywhere.

    Args:
        setting: The setting.
        init_r: The rank.

    Returns:
        The adapted model.
    """
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
    # It counts ranks and is not trained, but PEFT makes a trained parameter of it where it casts it to float32.
    for name, parameter in model.named_parameters():
        if "ranknum" in name:
            parameter.requires_grad_(False)
    allocator = model.base_model.rankallocator
    allocator.__class__ = _AllocatorWithinUniform  # and no closure, which a copy of the model would share
    allocator.most_parameters = adapter_parameters(model) * setting.rank // init_r
    return model


def _lora_ga(setting: Setting) -> Any:
    config = setting.config(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    # It takes the gradients of the weights themselves.
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
"""Name to method; the first is the reference, the last an upper reference with twice the parameters."""

REFERENCE, UPPER_REFERENCE = "uniform", "uniform-double-rank"


def adapter_parameters(model: nn.Module) -> int:
    """Parameters of the adapter that are in use.

    Args:
        model: A model with an adapter.

    Returns:
        The number, without classifier; of AdaLoRA those of the ranks that are kept, without the singular values.
        Before its first step all singular values are zero, and all ranks count.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if any("default" in getattr(layer, "lora_E", {}) for layer in layers):
        costs = {layer.lora_E["default"]: layer.in_features + layer.out_features for layer in layers}
        kept = sum(int((values != 0).sum()) * cost for values, cost in costs.items())
        return kept or sum(values.numel() * cost for values, cost in costs.items())
    weights = [of["default"].weight for layer in layers for of in (layer.lora_A, layer.lora_B) if "default" in of]
    return sum(weight.numel() for weight in weights)
