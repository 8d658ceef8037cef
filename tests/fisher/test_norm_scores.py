"""The norm of a layer's gradient, which ranks are proportional to by default, for every layer type."""

import copy

import pytest
import torch
from peft import LoraConfig

from fim_lora import FimConfig, RankAllocation, get_fim_scores
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


def config(**options):
    return LoraConfig(
        r=2,
        target_modules=MODULES,
        target_parameters=PARAMETERS,
        init_lora_weights="fim",
        fim_config=FimConfig(**options),
    )


@pytest.fixture(scope="module")
def scores():
    return get_fim_scores(EveryType(), batches(), config(fim_calibration_batches=3), show_progress_bar=False)


@pytest.mark.parametrize("name", NAMES)
def test_the_norm_equals_autograd(scores, name):
    assert scores.norms[name] == pytest.approx(squared_norms(name).mean().sqrt().item(), rel=1e-5)
    assert scores[name].num_entries == sum(weight.numel() for weight in weights_of(EveryType(), name))


def test_the_score_of_the_config_decides(scores):
    """A layer with many small entries has a larger norm than its mean says."""
    by_norm, by_mean = (RankAllocation.from_scores(scores, config(score=score)) for score in ("norm", "mean"))
    for allocation, values in ((by_norm, scores.norms), (by_mean, scores.means)):
        linear, expert = values["linear"], values["experts.up"]
        assert (allocation.ranks["linear"] >= allocation.ranks["experts.up"]) == (linear >= expert)
    assert by_norm.ranks != by_mean.ranks
