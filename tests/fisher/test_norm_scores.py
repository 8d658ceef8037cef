"""The norm of a layer's gradient, which ranks are proportional to by default, for every layer type."""

import copy
from collections import OrderedDict

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fim_lora import (
    FimConfig,
    FimScores,
    LayerScore,
    RankAllocation,
    get_fim_scores,
    initialize_lora_fim_ranks,
)
from helpers.every_layer_type import MODULES, NAMES, PARAMETERS, EveryType, batches


def weights_of(model, name):
    """All weights of a layer, by their names in PyTorch."""
    if name in PARAMETERS:
        return [model.get_parameter(name)]
    return [weight for key, weight in model.get_submodule(name).named_parameters() if key.endswith("weight")]


def squared_norms(name):
    """`‖G_t‖²_F` of every example, one backward pass at a time, in float64."""
    model = copy.deepcopy(EveryType()).double().eval()
    weights = weights_of(model, name)
    found = []
    for batch in batches():
        for row in range(len(batch["ids"])):
            loss = model(batch["ids"][row : row + 1])["loss"]
            found.append(sum(gradient.square().sum() for gradient in torch.autograd.grad(loss, weights)))
    return torch.stack(found)


@pytest.fixture(scope="module")
def scores():
    fim = {"init_lora_weights": "fim", "fim_config": FimConfig(fim_calibration_batches=3)}
    config = LoraConfig(r=2, target_modules=MODULES, target_parameters=PARAMETERS, **fim)
    return get_fim_scores(EveryType(), batches(), config, show_progress_bar=False)


@pytest.mark.parametrize("name", NAMES)
def test_the_norm_equals_autograd(scores, name):
    assert scores.norms[name] == pytest.approx(squared_norms(name).mean().sqrt().item(), rel=1e-5)
    assert scores[name].num_entries == sum(weight.numel() for weight in weights_of(EveryType(), name))


def test_the_default_allocation_by_hand():
    """Norms 8, 2 and 4 under a budget of 4 · (20 + 8 + 12) parameters: λ = 160 / (8 · 20 + 2 · 8 + 4 · 12) = 0.714."""
    layers = {
        "wide": LayerScore(0.64, None, 1, (10, 10)),
        "narrow": LayerScore(0.25, None, 1, (4, 4)),
        "experts": LayerScore(0.5, None, 1, (4, 4), parameters_per_rank=12, num_entries=32),
    }
    scores = FimScores(layers)
    assert scores.norms == pytest.approx({"wide": 8, "narrow": 2, "experts": 4})
    config = LoraConfig(r=4, init_lora_weights="fim", fim_config=FimConfig(r_max=8))
    allocation = RankAllocation.from_scores(scores, config)
    # 5.71, 1.43 and 2.86 are rounded down. Of the 28 parameters that are left the experts get a rank, and then only
    # the narrow layer fits.
    assert allocation.ranks == {"wide": 5, "narrow": 2, "experts": 3}
    assert (allocation.budget, allocation.budget_used) == (160, 152)
    assert allocation.layer_scores == scores.norms


@pytest.mark.parametrize(("score", "ranks"), [("mean", [13, 3]), ("norm", [11, 5])])
def test_given_numbers_are_means(score, ranks):
    model = nn.Sequential(OrderedDict(q=nn.Linear(16, 16), v=nn.Linear(16, 16)))
    fim_config = FimConfig(score=score)
    lora_config = LoraConfig(r=8, target_modules=["q", "v"], init_lora_weights="fim", fim_config=fim_config)
    allocation = initialize_lora_fim_ranks(get_peft_model(model, lora_config), fim_scores={"q": 4.0, "v": 1.0})
    assert list(allocation.ranks.values()) == ranks
