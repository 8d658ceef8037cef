"""Variants of LoRA and whole architectures: scores, ranks, output, and the way through stock PEFT."""

import copy
import dataclasses
import os
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fim_lora import FimConfig, RankAllocation, get_fim_scores, initialize_lora_fim_ranks
from fim_lora.peft_integration import _NOT_RESIZABLE
from test_initialization import fim_lora_config, fim_model, logits, lora_layers, randomise, run_own_loop, state_of
from test_layer_types import TARGETS, Attention, Mixture, attention_batches, batches_of, floats
from tiny_models import (
    VOCABULARY,
    gpt2,
    llama,
    lm_batches,
    number_of_terms,
    running_out_of_memory,
    sum_of_losses,
    token_batch,
)

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


def mixtral(**options):
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(num_local_experts=4, **COMMON, **options))


def qwen_moe():
    torch.manual_seed(0)
    options = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**COMMON, **options))


def qwen3_moe():
    torch.manual_seed(0)
    options = {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 6}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON, **options))


def olmoe():
    torch.manual_seed(0)
    return OlmoeForCausalLM(OlmoeConfig(num_experts=4, **COMMON))


def truth_of(model, batches, weights):
    """`mean(G_t ∘ G_t)` of given weights, averaged over examples, in float64."""
    values = {name: [] for name in weights}
    for batch in batches:
        size, terms = len(batch["input_ids"]), number_of_terms(model, batch)
        for row in range(size):
            share = sum_of_losses(model, batch, slice(row, row + 1)) * size / terms
            gradients = torch.autograd.grad(share, list(weights.values()))
            for name, gradient in zip(weights, gradients, strict=True):
                values[name].append(gradient.square().mean().item())
    return {name: sum(value) / len(value) for name, value in values.items()}


@pytest.mark.parametrize("make", [mixtral, qwen_moe])
def test_experts_of_transformers_and_the_way_through_stock_peft(tmp_path, make):
    config = fim_lora_config(r=4, target_modules=("q_proj",), target_parameters=EXPERTS, task_type="CAUSAL_LM")
    model = get_peft_model(make(), config)
    run_own_loop(model)
    allocation = initialize_lora_fim_ranks(model)
    double = make()
    double.config._experts_implementation = "eager"  # the other kernels have no float64
    double = double.double().eval()
    weights = {
        name: double.get_parameter(name if "experts" in name else f"{name}.weight") for name in allocation.ranks
    }
    for name, value in truth_of(double, lm_batches(), weights).items():
        assert allocation.scores[name].mean == pytest.approx(value, rel=1e-4), name
        assert allocation.scores[name].num_examples == 12
    assert len(set(allocation.ranks.values())) > 1
    torch.testing.assert_close(logits(model), logits(make()))
    randomise(model)
    torch.save(logits(model), tmp_path / "logits.pt")
    model.save_pretrained(tmp_path)
    code = f"""
        import sys, torch
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from transformers import MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM
        from peft import PeftModel
        from tiny_models import token_batch
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
    model.config._experts_implementation = "eager"  # the other kernels have no float64
    return model.double().eval()


def weights_of(model, names):
    parameters = dict(model.named_parameters())
    return {name: parameters.get(name, parameters.get(f"{name}.weight")) for name in names}


ROUTER = "mlp.gate.weight"


@pytest.mark.parametrize("own_loop", [False, True])
@pytest.mark.parametrize("make", [mixtral, qwen_moe, qwen3_moe, olmoe])
def test_routers_of_transformers(make, own_loop):
    """They return logits, of which the model uses only what is made of them."""
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
    randomise(model)
    model(**token_batch()).loss.backward()


@pytest.mark.parametrize("evaluated_before", [False, True])
def test_a_loss_on_the_logits_of_a_router(evaluated_before):
    """The balance of the load, where a hook of transformers keeps the logits. It is one of whole batches."""
    batches = [token_batch(1, seed=seed) for seed in range(3)]
    options = {"output_router_logits": True, "router_aux_loss_coef": 3.0}
    model = mixtral(**options)
    if evaluated_before:  # from then on the hook is there
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


def test_adapters_that_peft_ties_are_refused_before_anything_is_changed():
    if version("peft").startswith("0.18."):
        pytest.skip("this PEFT ties no adapters")
    base = llama(tie_word_embeddings=True)
    config = fim_lora_config(target_modules=("embed_tokens", "lm_head"), ensure_weight_tying=True)
    with pytest.raises(ValueError, match="ensure_weight_tying=True PEFT makes one adapter"):
        get_peft_model(base, config)
    assert not any("lora_" in name for name, _ in base.named_parameters())


def test_trainable_tokens_beside_lora():
    model = fim_model(trainable_token_indices=[3, 5])
    expected = get_fim_scores(llama(), lm_batches(), fim_lora_config(), show_progress_bar=False)
    allocation = initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)
    assert allocation.scores == expected
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("trainable_tokens" in name for name in trained)
    assert torch.equal(logits(model), logits(llama()))


def test_lora_bias():
    model = fim_model(gpt2(), target_modules=("c_attn", "c_fc"), lora_bias=True, score_exponent=0.5)
    allocation = initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)
    for name, rank in allocation.ranks.items():
        factor = model.get_submodule(f"base_model.model.{name}").lora_B["default"]
        assert factor.weight.shape[1] == rank
        assert factor.bias is not None
        assert factor.bias.requires_grad
        assert not factor.bias.any()
    assert torch.equal(logits(model), logits(gpt2()))


class Layers(nn.Module):
    """One of each kind."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.convolution = nn.Embedding(11, 6), nn.Conv1d(6, 6, 3, padding=1)
        self.attention, self.linear = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 2)

    def forward(self, ids):
        x = self.convolution(self.embedding(ids).mT).mT
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.linear(x).square().mean()


KINDS = ["embedding", "convolution", "attention", "linear"]


@pytest.mark.parametrize("way", ["get_peft_model", "low_cpu_mem_usage", "inject_adapter_in_model"])
def test_every_kind_of_layer_in_every_way_to_make_an_adapter(way):
    config = LoraConfig(
        r=2, target_modules=KINDS, init_lora_weights="fim", fim_config=FimConfig(2, score_exponent=0.5)
    )
    batches = [torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    plain = get_fim_scores(Layers(), batches, config, show_progress_bar=False)
    if way == "inject_adapter_in_model":
        model = inject_adapter_in_model(config, Layers())
    else:
        model = get_peft_model(Layers(), config, low_cpu_mem_usage=way == "low_cpu_mem_usage")
    on_meta = any(parameter.device.type == "meta" for parameter in model.parameters())
    assert on_meta == (way == "low_cpu_mem_usage")
    allocation = initialize_lora_fim_ranks(model, batches, show_progress_bar=False)
    assert set(allocation.ranks) == set(KINDS)
    assert allocation.scores == plain
    assert sum(allocation.ranks.values()) == 8
    assert not any(parameter.device.type == "meta" for parameter in model.parameters())
    torch.testing.assert_close(model(batches[0]), Layers()(batches[0]))
    model(batches[0]).backward()
    gradients = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    # By B; of the embedding by what PEFT calls A, and of attention both projections.
    assert len(gradients) >= 4


def convnext():
    torch.manual_seed(0)
    config = ConvNextConfig(num_stages=2, hidden_sizes=[4, 8], depths=[1, 1], patch_size=4, num_labels=3)
    return ConvNextForImageClassification(config)


def test_depthwise_convolutions_of_a_vision_model():
    """Ranks in steps of the groups: 4 and 8 channels."""
    config = fim_lora_config(
        r=8, batches=2, target_modules=("dwconv", "depthwise_conv", "pwconv1", "pointwise_conv1", "patch_embeddings")
    )
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


def test_parameters_and_attention_on_the_meta_device():
    config = LoraConfig(
        r=2, target_modules=["first"], target_parameters=TARGETS, init_lora_weights="fim", fim_config=FimConfig(2)
    )
    model = get_peft_model(Mixture(), config, low_cpu_mem_usage=True)
    batches = batches_of(floats(7, 6))
    initialize_lora_fim_ranks(model, batches, show_progress_bar=False)
    torch.testing.assert_close(model(**batches[0])["loss"], Mixture()(**batches[0])["loss"])
    config = fim_lora_config(r=4, target_modules=("attention",), batches=2)
    model = get_peft_model(Attention(), config, low_cpu_mem_usage=True)
    initialize_lora_fim_ranks(model, attention_batches(), show_progress_bar=False)
    batch = attention_batches()[0]
    torch.testing.assert_close(model(**batch)["loss"], Attention()(**batch)["loss"])


def test_a_trained_adapter_beside_it_stays():
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]), "other")
    randomise(model)
    expected = logits(model)
    model.add_adapter("fim", fim_lora_config(target_modules=("embed_tokens", "v_proj")))
    allocation = initialize_lora_fim_ranks(model, lm_batches(), adapter_name="fim", show_progress_bar=False)
    plain = get_fim_scores(
        llama(), lm_batches(), fim_lora_config(target_modules=("embed_tokens", "v_proj")), show_progress_bar=False
    )
    assert allocation.scores == plain
    assert torch.equal(logits(model), expected)
    model.set_adapter("fim")
    assert torch.equal(logits(model), logits(llama()))
    model(**token_batch()).loss.backward()


# --- The fields of LoraConfig with which PEFT builds another kind of layer ---


def sub_config(name, **options):
    """A sub-config that older versions of PEFT do not have."""
    if not hasattr(peft, name):
        pytest.skip(f"this version of PEFT has no {name}")
    return getattr(peft, name)(**options)


def arrow_config():
    config = sub_config("ArrowConfig")
    config.task_adapter_names, config.gks_adapter_names = ["task_0"], []  # as `create_arrow_model` sets them
    return config


REFUSED = {
    "kasa_config": lambda: sub_config("KasaConfig"),
    "use_bdlora": lambda: sub_config("BdLoraConfig", target_modules_bd_a=["q_proj", "v_proj", "down_proj"], nblocks=2),
    "arrow_config": arrow_config,
}
# Tokens of the first example of `token_batch()`, so that aLoRA is active there.
INVOCATION = token_batch()["input_ids"][0, 4:6].tolist()
VARIANTS = {
    "dora": lambda: {"use_dora": True},
    "alora": lambda: {"alora_invocation_tokens": INVOCATION},
    "velora": lambda: {"velora_config": sub_config("VeloraConfig", num_groups=4)},
    "velora once": lambda: {"velora_config": sub_config("VeloraConfig", num_groups=4, init_type="batch_average_once")},
    "velora random": lambda: {"velora_config": sub_config("VeloraConfig", num_groups=4, init_type="random")},
    "monteclora": lambda: {"monteclora_config": sub_config("MontecloraConfig", buffer_size=4)},
}


def test_every_variant_that_peft_knows_is_tested_or_refused():
    known = {field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")}
    tested = {"use_dora", "alora_invocation_tokens", "velora_config", "monteclora_config"}
    assert known <= tested | set(_NOT_RESIZABLE)
    assert set(REFUSED) == set(_NOT_RESIZABLE)


@pytest.mark.parametrize("field", REFUSED)
def test_forms_of_lora_that_cannot_be_resized_are_refused_before_anything_is_changed(field):
    config = fim_lora_config(**{field: REFUSED[field]()})
    base = llama()
    modules = [(name, id(module)) for name, module in base.named_modules()]
    with pytest.raises(ValueError, match=f"{field} does not go together with init_lora_weights='fim'"):
        get_peft_model(base, config)
    assert [(name, id(module)) for name, module in base.named_modules()] == modules
    assert all(torch.equal(value, llama().state_dict()[name]) for name, value in base.state_dict().items())


@pytest.mark.parametrize("field", REFUSED)
def test_a_form_that_cannot_be_resized_is_also_refused_where_it_was_set_later(field):
    model = fim_model()
    setattr(model.peft_config["default"], field, REFUSED[field]())
    before = state_of(model)
    with pytest.raises(ValueError, match=f"{field} does not go together"):
        initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)
    assert state_of(model) == before


@pytest.mark.parametrize("field", sorted(set(REFUSED) - {"kasa_config"}))
def test_a_form_that_cannot_be_resized_is_refused_in_two_steps_as_well(field):
    config = fim_lora_config(**{field: REFUSED[field]()})
    with pytest.raises(ValueError, match=f"{field} does not go together"):
        get_fim_scores(llama(), lm_batches(), config, show_progress_bar=False)


def test_kasa_by_the_way_that_its_error_names(tmp_path):
    """Stock PEFT cuts the base weights once, at the ranks of the allocation, when the adapter is made and loaded."""
    # KaSA needs ranks below both sides of a weight.
    config = fim_lora_config(r=4, r_max=8, task_type="CAUSAL_LM", kasa_config=sub_config("KasaConfig"))
    scores = get_fim_scores(llama(), lm_batches(), config, show_progress_bar=False)
    assert scores == get_fim_scores(llama(), lm_batches(), fim_lora_config(), show_progress_bar=False)
    allocation = RankAllocation.from_scores(scores, config)
    model = get_peft_model(llama(), allocation.to_lora_config(config))
    for name, rank in allocation.ranks.items():
        layer, weight = model.base_model.model.get_submodule(name), llama().get_submodule(name).weight
        assert layer.r["default"] == rank
        left, values, right = torch.linalg.svd(weight)
        kept = len(values) - rank
        truth = left[:, :kept] * values[:kept] @ right[:kept]
        torch.testing.assert_close(layer.get_base_layer().weight, truth, rtol=1e-4, atol=1e-5)
    randomise(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("own_loop", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_lora(tmp_path, variant, own_loop):
    options = VARIANTS[variant]() | {"task_type": "CAUSAL_LM"}
    plain = get_fim_scores(llama(), lm_batches(), fim_lora_config(), show_progress_bar=False)
    model = fim_model(score_exponent=0.5, **options).train()
    if own_loop:
        run_own_loop(model)
    torch.manual_seed(5)
    allocation = initialize_lora_fim_ranks(model, None if own_loop else lm_batches(), show_progress_bar=False)
    for name, score in plain.items():
        assert allocation.scores[name].mean == pytest.approx(score.mean, rel=1e-4)
    assert len(set(allocation.ranks.values())) > 1
    torch.testing.assert_close(logits(model), logits(llama()), rtol=1e-5, atol=1e-5)

    patterns = {"rank_pattern": allocation.rank_pattern, "alpha_pattern": allocation.alpha_pattern}
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], **patterns, **options)
    base = llama()
    torch.manual_seed(5)
    stock_state = get_peft_model(base, config).state_dict()
    assert model.state_dict().keys() == stock_state.keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, stock_state[name], rtol=1e-5, atol=1e-6, msg=name)

    model.train()(**token_batch()).loss.backward()
    gradients = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert sum("lora_B" in name for name in gradients) == len(allocation.ranks)
    randomise(model)
    expected = logits(model)
    assert not torch.allclose(expected, logits(llama()), atol=0.1)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path)), expected)


def test_a_failure_leaves_the_projections_of_velora_as_they_were():
    """They are learned once, and buffers of PEFT's own kind. The truth is a model to which nothing happened."""
    options = {"velora_config": sub_config("VeloraConfig", num_groups=4, init_type="batch_average_once")}
    model, untouched = fim_model(**options).train(), fim_model(**options).train()
    for one in (model, untouched):
        run_own_loop(one)
        randomise(one)
        one.zero_grad()
    before = copy.deepcopy(model.state_dict())
    assert any("velora" in name and value.any() for name, value in before.items())
    with running_out_of_memory(list(lora_layers(model).values())[-1]):
        initialize_lora_fim_ranks(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for one in (model, untouched):
        one(**token_batch()).loss.backward()
    for (name, one), (_, other) in zip(model.named_parameters(), untouched.named_parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        assert one.grad is None or torch.equal(one.grad, other.grad), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes_of_buffers_are_those_of_stock_peft(dtype):
    options = {"velora_config": sub_config("VeloraConfig", num_groups=4)}
    model = fim_model(llama().to(dtype), **options)
    initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)
    plain = get_peft_model(llama().to(dtype), LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], **options))
    dtypes = {name: value.dtype for name, value in plain.state_dict().items()}
    assert {name: value.dtype for name, value in model.state_dict().items()} == dtypes
