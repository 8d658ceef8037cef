"""Experts, routers, tied weights and depthwise convolutions of transformers against autograd in float64."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import ConvNextConfig, ConvNextForImageClassification

from fim_lora import get_fim_scores, initialize_lora_fim_ranks
from helpers.adapters import fim_lora_config, logits, randomize, run_own_loop
from helpers.expert_models import EXPERTS, mixtral, olmoe, qwen3_moe, qwen_moe
from helpers.own_warnings import UNCERTAIN_ROWS
from helpers.tiny_models import llama, lm_batches, per_example_values, token_batch


def truth_of(model, batches, weights):
    """`mean(G_t ∘ G_t)` of given weights, averaged over examples, in float64."""
    values = per_example_values(model, batches, weights)
    return {name: sum(value) / len(value) for name, value in values.items()}


@UNCERTAIN_ROWS
@pytest.mark.parametrize("make", [mixtral, qwen_moe])
def test_experts_of_transformers_and_the_way_through_stock_peft(tmp_path, make):
    config = fim_lora_config(r=4, target_modules=("q_proj",), target_parameters=EXPERTS, task_type="CAUSAL_LM")
    model = get_peft_model(make(), config)
    run_own_loop(model)
    allocation = initialize_lora_fim_ranks(model)
    double = make()
    double.config._experts_implementation = "eager"  # the other kernels do not support float64
    double = double.double().eval()
    weights = {
        name: double.get_parameter(name if "experts" in name else f"{name}.weight") for name in allocation.ranks
    }
    for name, value in truth_of(double, lm_batches(), weights).items():
        assert allocation.scores[name].mean == pytest.approx(value, rel=1e-4), name
        assert allocation.scores[name].num_examples == 12
    assert len(set(allocation.ranks.values())) > 1
    torch.testing.assert_close(logits(model), logits(make()))
    randomize(model)
    torch.save(logits(model), tmp_path / "logits.pt")
    model.save_pretrained(tmp_path)
    code = f"""
        import sys, torch
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        from transformers import MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM
        from peft import PeftModel
        from helpers.tiny_models import token_batch
        torch.manual_seed(0)
        base = {type(make()).__name__}({type(make().config).__name__}(**{make().config.to_diff_dict()!r}))
        model = PeftModel.from_pretrained(base, {str(tmp_path)!r}).eval()
        with torch.no_grad():
            logits = model(**token_batch()).logits
        torch.testing.assert_close(logits, torch.load({str(tmp_path / "logits.pt")!r}), rtol=1e-4, atol=1e-4)
        assert not any(name.startswith("fim_lora") for name in sys.modules)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=os.environ, check=False
    )
    assert result.returncode == 0, result.stderr


def in_double(model):
    model.config._experts_implementation = "eager"  # the other kernels do not support float64
    return model.double().eval()


def weights_of(model, names):
    parameters = dict(model.named_parameters())
    return {name: parameters.get(name, parameters.get(f"{name}.weight")) for name in names}


ROUTER = "mlp.gate.weight"


@UNCERTAIN_ROWS
@pytest.mark.parametrize("own_loop", [False, True])
@pytest.mark.parametrize("make", [mixtral, qwen_moe, qwen3_moe, olmoe])
def test_routers_of_transformers(make, own_loop):
    """Routers return logits, but the model uses only the values computed from them."""
    model = get_peft_model(
        make(), fim_lora_config(r=4, target_modules=("q_proj",), target_parameters=[ROUTER, *EXPERTS])
    )
    if own_loop:
        run_own_loop(model)
        allocation = initialize_lora_fim_ranks(model)
    else:
        allocation = initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)
    assert sum(name.endswith(ROUTER) for name in allocation.ranks) == 2
    double = in_double(make())
    for name, value in truth_of(double, lm_batches(), weights_of(double, allocation.ranks)).items():
        assert allocation.scores[name].mean == pytest.approx(value, rel=1e-4), name
        assert allocation.scores[name].num_examples == 12
    torch.testing.assert_close(logits(model), logits(make()))
    randomize(model)
    model(**token_batch()).loss.backward()


@pytest.mark.parametrize("evaluated_before", [False, True])
def test_a_loss_on_the_logits_of_a_router(evaluated_before):
    """The load-balancing loss, for which a hook of transformers keeps the logits. It belongs to whole batches."""
    batches = [token_batch(1, seed=seed) for seed in range(3)]
    options = {"output_router_logits": True, "router_aux_loss_coef": 3.0}
    model = mixtral(**options)
    if evaluated_before:  # registers the hook of transformers
        logits(model)
    config = fim_lora_config(target_modules=("q_proj",), target_parameters=[ROUTER])
    scores = get_fim_scores(model, batches, config, show_progress_bar=False)
    double = in_double(mixtral(**options))
    weights = weights_of(double, scores)
    without = truth_of(double, batches, weights)
    for name, weight in weights.items():
        values = [torch.autograd.grad(double(**batch).loss, weight)[0].square().mean().item() for batch in batches]
        assert scores[name].mean == pytest.approx(sum(values) / len(values), rel=1e-4), name
        if name.endswith(ROUTER):
            assert scores[name].mean != pytest.approx(without[name], rel=0.01)


@pytest.mark.parametrize("targets", [("model.embed_tokens",), ("lm_head",), ("model.embed_tokens", "lm_head")])
def test_a_tied_weight_has_the_efim_of_the_use_that_is_adapted(targets):
    base = llama(tie_word_embeddings=True)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    scores = get_fim_scores(base, lm_batches(), fim_lora_config(target_modules=targets), show_progress_bar=False)
    untied = llama(tie_word_embeddings=True).double().eval()
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    truth = truth_of(untied, lm_batches(), {name: untied.get_submodule(name).weight for name in targets})
    assert {name: score.mean for name, score in scores.items()} == pytest.approx(truth, rel=1e-5)


def convnext():
    torch.manual_seed(0)
    config = ConvNextConfig(num_stages=2, hidden_sizes=[4, 8], depths=[1, 1], patch_size=4, num_labels=3)
    return ConvNextForImageClassification(config)


def test_depthwise_convolutions_of_a_vision_model():
    """Ranks in steps of the groups: 4 and 8 channels."""
    named_as_before = hasattr(convnext().convnext.encoder.stages[0].layers[0], "dwconv")
    names = ("dwconv", "pwconv1") if named_as_before else ("depthwise_conv", "pointwise_conv1")
    config = fim_lora_config(r=8, batches=2, target_modules=(*names, "patch_embeddings"))
    images = torch.randn(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batches = [{"pixel_values": x, "labels": torch.tensor([0, 1, 2])} for x in images]
    model = get_peft_model(convnext(), config)
    allocation = initialize_lora_fim_ranks(model, batches, show_progress_bar=False)
    grouped = {
        name: convnext().get_submodule(name).groups
        for name in allocation.ranks
        if getattr(convnext().get_submodule(name), "groups", 1) > 1
    }
    assert sorted(set(grouped.values())) == [4, 8]
    assert all(allocation.ranks[name] % groups == 0 for name, groups in grouped.items())
    assert allocation.budget_used <= allocation.budget
    double = convnext().double().eval()
    weights = {name: double.get_submodule(name).weight for name in allocation.ranks}
    sums = dict.fromkeys(weights, 0.0)
    for batch in batches:
        for x, label in zip(batch["pixel_values"], batch["labels"], strict=True):
            loss = double(pixel_values=x[None].double(), labels=label[None]).loss
            for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
                sums[name] += gradient.square().mean().item() / 6
    for name, value in sums.items():
        assert allocation.scores[name].mean == pytest.approx(value, rel=1e-3), name
