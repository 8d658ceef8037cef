"""`r_min=0`: layers of rank 0 lose their adapter, and PEFT is told so."""

import copy
from importlib.metadata import version

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from fim_lora import RankAllocation, get_fim_scores, initialize_lora_fim_ranks
from fim_lora.plotting import draw_rank_map
from test_initialization import fim_lora_config, fim_model, logits, randomise, run_own_loop
from test_layer_types import TARGETS, Attention, Mixture, attention_batches, mixture_model
from test_stock_peft import stock
from tiny_models import llama, lm_batches, token_batch


def adapted(model, adapter="default"):
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and adapter in module.r
    }


def half(model, adapter="default"):
    """Scores of which every second is zero, and the names of those."""
    names = sorted(adapted(model, adapter))
    return {name: float(index % 2 == 0) for index, name in enumerate(names)}, set(names[1::2])


TARGET_FORMS = {
    "list": {"target_modules": ["q_proj", "down_proj"]},
    "expression": {"target_modules": r".*\.(q|v)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "layers_to_transform": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1, 2]},
    "exclude_modules": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.v_proj"]},
}


@pytest.mark.parametrize("options", TARGET_FORMS.values(), ids=TARGET_FORMS)
def test_layers_of_rank_zero_are_plain_again_also_in_stock_peft(tmp_path, options):
    model = fim_model(llama(layers=3), r_min=0, task_type="CAUSAL_LM", **options)
    weights = {name: id(model.get_submodule(f"base_model.model.{name}").get_base_layer()) for name in adapted(model)}
    scores, dropped = half(model)
    allocation = initialize_lora_fim_ranks(model, fim_scores=scores)
    assert set(allocation.dropped_layers) == dropped
    assert adapted(model) == set(scores) - dropped
    assert all(id(model.get_submodule(f"base_model.model.{name}")) == weights[name] for name in dropped)
    assert torch.equal(logits(model), logits(llama(layers=3)))
    randomise(model)
    torch.save(logits(model), tmp_path / "logits.pt")
    model.save_pretrained(tmp_path)
    stock(f"""
        model = PeftModel.from_pretrained(llama(layers=3), {str(tmp_path)!r}).eval()
        found = {{name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "lora_A")}}
        assert found == {set(scores) - dropped!r}, found
        with torch.no_grad():
            logits = model(**token_batch()).logits
        torch.testing.assert_close(logits, torch.load({str(tmp_path / "logits.pt")!r}), rtol=1e-5, atol=1e-5)
    """)


def test_hooks_and_an_optimizer_of_before():
    model = fim_model(r_min=0, r_max=32, score_exponent=4.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    run_own_loop(model)
    allocation = initialize_lora_fim_ranks(model)
    assert allocation.dropped_layers
    model(**token_batch()).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in trained} == adapted(model)
    optimizer.step()
    assert not torch.equal(logits(model), logits(llama()))


def test_another_adapter_keeps_its_layers_and_its_place():
    base = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "other")
    randomise(base)
    expected = logits(base)
    base.add_adapter("fim", fim_lora_config(r_min=0, target_modules=("q_proj", "v_proj")))
    base.set_adapter("fim")
    scores, dropped = half(base, "fim")
    initialize_lora_fim_ranks(base, fim_scores=scores, adapter_name="fim")
    assert adapted(base, "fim") == set(scores) - dropped
    assert adapted(base, "other") == set(scores)
    assert torch.equal(logits(base), logits(llama()))
    assert not any(p.requires_grad for name, p in base.named_parameters() if ".other." in name)
    base.set_adapter("other")
    assert torch.equal(logits(base), expected)


@pytest.mark.parametrize("dropped", [TARGETS[:1], TARGETS[1:]])
def test_parameters_of_rank_zero(tmp_path, dropped):
    model = mixture_model(r_min=0)
    scores = {name: float(name not in dropped) for name in TARGETS}
    allocation = initialize_lora_fim_ranks(model, fim_scores=scores)
    assert allocation.dropped_layers == dropped
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    x, target = torch.randn(2, 7, 6), torch.rand(2)
    expected = model(x, target)["loss"]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Mixture(), tmp_path)
    torch.testing.assert_close(loaded(x, target)["loss"], expected)
    assert sum("lora_" in name for name in loaded.state_dict()) == 2


def test_a_parameter_that_another_adapter_needs_stays_as_it_was():
    model = mixture_model()
    initialize_lora_fim_ranks(model, fim_scores=dict.fromkeys(TARGETS, 1.0))
    config = copy.deepcopy(mixture_model(r_min=0).peft_config["default"])
    if version("peft").startswith("0.18."):
        pytest.skip("this PEFT allows only one adapter with target_parameters")
    model.add_adapter("second", config)
    before = list(model.state_dict())
    with pytest.raises(ValueError, match="adapts it too"):
        initialize_lora_fim_ranks(model, fim_scores={TARGETS[0]: 0.0, TARGETS[1]: 1.0}, adapter_name="second")
    assert list(model.state_dict()) == before
    assert model.peft_config["second"].init_lora_weights == "fim"


def test_attention_of_rank_zero_is_plain_again():
    config = fim_lora_config(r=4, r_min=0, target_modules=("attention", "first"))
    model = get_peft_model(Attention(first=False), config)
    initialize_lora_fim_ranks(model, fim_scores={"attention": 0.0, "first": 1.0})
    plain = model.base_model.model.attention
    assert type(plain) is torch.nn.MultiheadAttention
    assert plain.state_dict().keys() == Attention(first=False).attention.state_dict().keys()
    batch = attention_batches()[0]
    torch.testing.assert_close(model(**batch)["loss"], Attention(first=False)(**batch)["loss"])


def test_biases_that_only_lora_layers_train():
    base = llama(attention_bias=True)
    model = fim_model(base, r_min=0, bias="lora_only", target_modules=("q_proj", "v_proj"))
    scores, dropped = half(model)
    initialize_lora_fim_ranks(model, fim_scores=scores)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "bias" in name}
    assert {name.removeprefix("base_model.model.").partition(".base_layer")[0] for name in trained} == (
        set(scores) - dropped
    )


def test_other_trainers_and_the_files(tmp_path):
    config = fim_lora_config(r_min=0, score_exponent=4.0)
    scores = get_fim_scores(llama(), lm_batches(), config, show_progress_bar=False)
    allocation = RankAllocation.from_scores(scores, config)
    dropped = set(allocation.dropped_layers)
    assert dropped
    assert adapted(get_peft_model(llama(), allocation.to_lora_config(config))) == set(scores) - dropped
    allocation.save(tmp_path / "allocation.json")
    assert RankAllocation.load(tmp_path / "allocation.json") == allocation
    draw_rank_map(allocation, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000
