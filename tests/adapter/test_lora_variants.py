"""Variants of LoRA: scores, ranks, output, and which variants are refused."""

import copy
import dataclasses
from importlib.metadata import version

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from fim_lora import RankAllocation, get_fim_scores, initialize_lora_fim_ranks
from fim_lora.adapter.checks import NOT_RESIZABLE
from helpers.adapters import fim_lora_config, fim_model, logits, lora_layers, randomize, run_own_loop, state_of
from helpers.tiny_models import llama, lm_batches, running_out_of_memory, token_batch


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
    assert known <= tested | set(NOT_RESIZABLE)
    assert set(REFUSED) == set(NOT_RESIZABLE)


@pytest.mark.parametrize("field", REFUSED)
def test_forms_of_lora_that_cannot_be_resized_are_refused_before_anything_is_changed(field):
    config = fim_lora_config(**{field: REFUSED[field]()})
    base = llama()
    modules = [(name, id(module)) for name, module in base.named_modules()]
    with pytest.raises(ValueError, match=f"{field} cannot be combined with init_lora_weights='fim'"):
        get_peft_model(base, config)
    assert [(name, id(module)) for name, module in base.named_modules()] == modules
    assert all(torch.equal(value, llama().state_dict()[name]) for name, value in base.state_dict().items())


@pytest.mark.parametrize("field", REFUSED)
def test_a_form_that_cannot_be_resized_is_also_refused_where_it_was_set_later(field):
    model = fim_model()
    setattr(model.peft_config["default"], field, REFUSED[field]())
    before = state_of(model)
    with pytest.raises(ValueError, match=f"{field} cannot be combined with"):
        initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)
    assert state_of(model) == before


@pytest.mark.parametrize("field", sorted(set(REFUSED) - {"kasa_config"}))
def test_a_form_that_cannot_be_resized_is_refused_in_two_steps_as_well(field):
    config = fim_lora_config(**{field: REFUSED[field]()})
    with pytest.raises(ValueError, match=f"{field} cannot be combined with"):
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
    randomize(model)
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
    randomize(model)
    expected = logits(model)
    assert not torch.allclose(expected, logits(llama()), atol=0.1)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path)), expected)


def test_a_failure_leaves_the_projections_of_velora_as_they_were():
    """The projections are learned once and kept in PEFT's buffers. The reference is a model without the failure."""
    options = {"velora_config": sub_config("VeloraConfig", num_groups=4, init_type="batch_average_once")}
    model, untouched = fim_model(**options).train(), fim_model(**options).train()
    for one in (model, untouched):
        run_own_loop(one)
        randomize(one)
        one.zero_grad()
    before = copy.deepcopy(model.state_dict())
    assert any("velora" in name and value.any() for name, value in before.items())
    with running_out_of_memory(list(lora_layers(model).values())[-1]):
        initialize_lora_fim_ranks(model, discard_weights=True)
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
