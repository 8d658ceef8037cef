"""The eFIM of `nn.MultiheadAttention` against per-example gradients by autograd in float64."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fim_lora import FimConfig, get_fim_scores, initialize_lora_fim_ranks
from helpers.attention import Attention, attention_batches
from helpers.calibration import norm_recorder
from helpers.own_warnings import FEWER_BATCHES
from helpers.single_layers import (
    assert_score,
    batches_of,
    by_row,
    floats,
    per_example_truth,
    scores_of,
    under_autocast,
)

WEIGHTS = ["attention.in_proj_weight", "attention.out_proj.weight"]
OPTIONS = [
    {},
    {"batch_first": True},
    {"batch_first": True, "first": False},
    {"memory": True, "bias": False},
    {"memory": True, "add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_equals_autograd(options):
    batches = attention_batches(options.get("memory", False))
    score = scores_of(Attention(**options), batches, "attention")["attention"]
    assert_score(score, per_example_truth(Attention(**options), batches, WEIGHTS, by_row))


@pytest.mark.parametrize("own_loop", [False, True])
def test_attention_as_peft_adapts_it(own_loop):
    """Both weights share one rank, from their joint eFIM. The cost of a rank is that of PEFT's layer."""
    batches = attention_batches()
    config = LoraConfig(
        r=4,
        target_modules=["attention", "first"],
        init_lora_weights="fim",
        fim_config=FimConfig(2, budget="parameters", score="mean", score_exponent=0.5),
    )
    model = get_peft_model(Attention(first=False), config).eval()
    uniform = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if own_loop:
        for batch in batches:
            model(**batch)["loss"].backward()
        allocation = initialize_lora_fim_ranks(model)
    else:
        allocation = initialize_lora_fim_ranks(model, batches, show_progress_bar=False)
    assert set(allocation.ranks) == {"attention", "first"}
    assert allocation.ranks["attention"] != allocation.ranks["first"]
    truth = Attention(first=False)
    assert_score(allocation.scores["attention"], per_example_truth(truth, batches, WEIGHTS, by_row))
    assert_score(allocation.scores["first"], per_example_truth(truth, batches, ["first.weight"], by_row))
    assert allocation.budget == uniform
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == allocation.num_parameters == allocation.budget_used
    attention = model.base_model.model.attention
    assert attention.r == attention.base_layer.out_proj.r == {"default": allocation.ranks["attention"]}
    with torch.no_grad():
        torch.testing.assert_close(model(**batches[0])["loss"], truth.eval()(**batches[0])["loss"])


@FEWER_BATCHES
def test_attention_of_a_plain_model_is_left_as_it_was():
    base = Attention()
    before = dict(base.named_parameters())
    scores = get_fim_scores(base, attention_batches(), LoraConfig(target_modules=["attention"]))
    assert_score(scores["attention"], per_example_truth(base, attention_batches(), WEIGHTS, by_row))
    assert {name: id(parameter) for name, parameter in base.named_parameters()} == {
        name: id(parameter) for name, parameter in before.items()
    }
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_attention_in_a_transformer_of_pytorch_with_dropout():
    """In training mode, the gradient depends on the units that were dropped."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.4, batch_first=True)
    x = torch.randn(1, 6, 8)

    def loss_of(layer):
        torch.manual_seed(3)
        return layer(x.to(next(layer.parameters()).dtype)).pow(3).sum()

    recorder = norm_recorder({"attention": layer.self_attn, "linear1": layer.linear1})
    recorder.start(layer)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    loss_of(layer).backward()
    after = torch.get_rng_state()
    scores = recorder.result()
    loss_of(layer)
    assert torch.equal(torch.get_rng_state(), after)

    # Dropout draws other units in float64, so a float32 gradient is the truth here.
    single = copy.deepcopy(layer).requires_grad_()
    loss_of(single).backward()
    weights = [single.self_attn.in_proj_weight.grad, single.self_attn.out_proj.weight.grad]
    truth = sum(weight.square().sum() for weight in weights) / sum(weight.numel() for weight in weights)
    assert scores["attention"].mean == pytest.approx(truth.item(), rel=1e-5)


@FEWER_BATCHES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_under_autocast(options, dtype):
    """The backward pass is outside of autocast, and runs the attention again under the autocast of the call."""
    batches = attention_batches(options.get("memory", False))
    config = LoraConfig(target_modules=["attention"])
    model = Attention(**options)
    scores = get_fim_scores(model, batches, config, forward_fn=under_autocast(dtype), show_progress_bar=False)
    truth = per_example_truth(Attention(**options), batches, WEIGHTS, by_row).mean().item()
    # The forward pass rounds to 8 bits (bfloat16) or 11 bits (float16).
    assert scores["attention"].mean == pytest.approx(truth, rel=0.1 if dtype == torch.bfloat16 else 0.01)
    exact = get_fim_scores(model, batches, config, show_progress_bar=False)
    assert scores["attention"].mean != exact["attention"].mean


def test_a_loss_on_attention_weights_is_refused():
    class OnWeights(Attention):
        def forward(self, x, target):
            y, weights = self.attention(x, x, x)
            return {"loss": y.square().mean() + weights.square().mean()}

    with pytest.raises(RuntimeError, match="second output of layer 'attention'"):
        scores_of(OnWeights(batch_first=True), batches_of(floats(5, 8)), "attention")
