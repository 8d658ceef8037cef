"""Ranks from the eFIM, directions from EVA."""

import copy
import dataclasses
import json
import warnings

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_eva_state_dict, get_peft_model
from transformers import BatchEncoding

from fim_lora import RankAllocation, get_fim_scores, initialize_lora_fim_ranks
from fim_lora.fisher.calibration import forward_fn_default
from helpers.adapters import fim_lora_config, fim_model, logits, lora_layers
from helpers.stock_peft import stock
from helpers.tiny_models import bert, class_batch, eva_batches, llama, lm_batches


@pytest.mark.parametrize("batch_type", [dict, BatchEncoding])
def test_eva_gives_only_directions(batch_type):
    """The first r_i principal directions. EVA alone would move ranks between layers that share an input."""
    batches = [batch_type(batch) for batch in eva_batches()]
    model = fim_model(init_lora_weights="eva", score_exponent=0.5, eva_config=EvaConfig(tau=0.9))
    allocation = initialize_lora_fim_ranks(model, batches, show_progress_bar=False)
    most = max(allocation.ranks.values())
    config = LoraConfig(
        r=most,
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0, tau=0.9),
    )
    truth = get_eva_state_dict(llama(), eva_batches(), config, show_progress_bar=False)
    for name, layer in lora_layers(model).items():
        a = layer.lora_A["default"].weight
        torch.testing.assert_close(a, truth[name][: allocation.ranks[name]].float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a @ a.T, torch.eye(len(a)), rtol=0, atol=1e-4)
        assert not layer.lora_B["default"].weight.any()
    shared = [allocation.ranks[f"model.layers.0.self_attn.{kind}_proj"] for kind in "qv"]
    assert shared[0] != shared[1]


@pytest.mark.parametrize("length", [20, 24])
def test_eva_of_batches_whose_label_is_a_class(length):
    # With as many tokens as examples, PEFT would silently treat the classes as a mask.
    batches = [class_batch(24, length, seed=seed) for seed in range(3)]
    model = fim_model(bert(), target_modules=("query", "value"), init_lora_weights="eva", task_type="SEQ_CLS")
    allocation = initialize_lora_fim_ranks(model, batches, show_progress_bar=False)
    most = max(allocation.ranks.values())
    config = fim_lora_config(most, target_modules=("query", "value"), task_type="SEQ_CLS")
    config.init_lora_weights, config.fim_config = "eva", None
    config.eva_config = EvaConfig(rho=1.0, use_label_mask=False)
    truth = get_eva_state_dict(bert().eval(), batches, config, show_progress_bar=False)
    for name, layer in lora_layers(model).items():
        expected = truth[name][: allocation.ranks[name]].to(torch.float32)
        torch.testing.assert_close(layer.lora_A["default"].weight, expected)


def test_eva_with_given_scores_and_a_layer_that_it_does_not_know():
    targets = ("q_proj", "embed_tokens")
    config = fim_lora_config(target_modules=targets, score_exponent=0.5)
    scores = get_fim_scores(llama(), lm_batches(), config, show_progress_bar=False)
    model = fim_model(target_modules=targets, init_lora_weights="eva", score_exponent=0.5)
    allocation = initialize_lora_fim_ranks(model, eva_batches(), scores, show_progress_bar=False)
    assert allocation.scores == scores
    assert torch.equal(logits(model), logits(llama()))
    embedding = model.base_model.model.model.embed_tokens
    assert embedding.r["default"] == allocation.ranks["model.embed_tokens"]
    assert embedding.lora_embedding_B["default"].any()


@pytest.mark.filterwarnings("ignore:This adapter never got its FIM ranks")
@pytest.mark.parametrize("eva_config", [None, EvaConfig(tau=0.9)])
def test_eva_warns_of_nothing_and_leaves_nothing_in_the_config(tmp_path, eva_config):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = fim_lora_config(init_lora_weights="eva", eva_config=eva_config, task_type="CAUSAL_LM")
        assert dataclasses.replace(config, r=4).eva_config == config.eva_config == eva_config
    model = get_peft_model(llama(), config)
    for folder in (tmp_path / "before", tmp_path / "after"):
        model.save_pretrained(folder)
        assert json.loads((folder / "adapter_config.json").read_text())["eva_config"] is None
        if folder.name == "before":
            assert model.peft_config["default"].eva_config == eva_config
            initialize_lora_fim_ranks(model, eva_batches(), show_progress_bar=False)
    assert model.peft_config["default"].eva_config is None
    torch.save(logits(model), tmp_path / "logits.pt")
    stock(f"""
        for folder in ("before", "after"):
            model = PeftModel.from_pretrained(llama(), {str(tmp_path)!r} + "/" + folder).eval()
            with torch.no_grad():
                logits = model(**token_batch()).logits
            torch.testing.assert_close(logits, torch.load({str(tmp_path / "logits.pt")!r}), rtol=1e-5, atol=1e-5)
    """)


def test_eva_needs_data_and_a_model_of_peft():
    model = fim_model(init_lora_weights="eva")
    for batch in lm_batches():
        model(**batch).loss.backward()
    with pytest.raises(ValueError, match="pass `dataloader`"):
        initialize_lora_fim_ranks(model)
    config = fim_lora_config(init_lora_weights="eva", target_modules=("layers.0.self_attn.q_proj",))
    scores = get_fim_scores(llama(), lm_batches(), config, show_progress_bar=False)
    with pytest.raises(ValueError, match="No config can hold directions from EVA"):
        RankAllocation.from_scores(scores, config).to_lora_config(config)


def test_a_failing_eva_leaves_no_trace():
    model = fim_model(init_lora_weights="eva")
    before = copy.deepcopy(model.state_dict())
    modes = {name: module.training for name, module in model.named_modules()}
    calls = []

    def forward_fn(model, batch):
        calls.append(1)
        if len(calls) > 5:
            raise OSError("the disk is gone")
        return forward_fn_default(model, batch)

    with pytest.raises(OSError, match="the disk is gone"):
        initialize_lora_fim_ranks(model, eva_batches(), forward_fn=forward_fn, show_progress_bar=False)
    assert model.peft_config["default"].init_lora_weights == "fim"
    assert {name: module.training for name, module in model.named_modules()} == modes
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert all(type(hook).__module__.startswith("fim_lora") for hook in hooks)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
