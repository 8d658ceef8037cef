"""`r_min=0`: layers of rank 0 lose their adapter, also in stock PEFT."""

import copy
from importlib.metadata import version

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from fim_lora import RankAllocation, get_fim_scores, initialize_lora_fim_ranks
from fim_lora.report.rank_map import draw_rank_map
from helpers.adapters import (
    adapted_layers,
    fim_lora_config,
    fim_model,
    logits,
    lora_layers,
    randomize,
    scores_without,
    state_of,
)
from helpers.attention import Attention, attention_batches
from helpers.mixtures import TARGETS, Mixture, mixture_model
from helpers.single_layers import WIDTH
from helpers.stock_peft import stock
from helpers.tiny_models import llama, lm_batches, running_out_of_memory


def half(model, adapter="default"):
    """Scores of which every second one is zero, and the names of the layers with a score of zero."""
    names = sorted(adapted_layers(model, adapter))
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
    weights = {
        name: id(model.get_submodule(f"base_model.model.{name}").get_base_layer()) for name in adapted_layers(model)
    }
    scores, dropped = half(model)
    allocation = initialize_lora_fim_ranks(model, fim_scores=scores)
    assert set(allocation.dropped_layers) == dropped
    assert adapted_layers(model) == set(scores) - dropped
    assert all(id(model.get_submodule(f"base_model.model.{name}")) == weights[name] for name in dropped)
    assert torch.equal(logits(model), logits(llama(layers=3)))
    randomize(model)
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


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj", "up_proj"), r".*\.(q_proj|v_proj|up_proj)"])
def test_more_than_twenty_kept_layers_are_the_same_in_stock_peft(tmp_path, targets):
    """PEFT shortens long lists of targets to common ends, which must not match a dropped layer."""
    model = fim_model(llama(layers=12), r_min=0, target_modules=targets, task_type="CAUSAL_LM")
    names = list(lora_layers(model))
    dropped = {name for name in names if (".q_proj" in name and ".3." in name) or ".11." in name}
    allocation = initialize_lora_fim_ranks(model, fim_scores=scores_without(names, dropped))
    assert set(allocation.dropped_layers) == dropped
    kept = set(names) - dropped
    assert len(kept) > 20
    assert lora_layers(model).keys() == kept
    randomize(model)
    torch.save(logits(model), tmp_path / "logits.pt")
    model.save_pretrained(tmp_path)
    stock(f"""
        model = PeftModel.from_pretrained(llama(layers=12), {str(tmp_path)!r}).eval()
        found = {{name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "lora_A")}}
        assert found == {kept!r}
        with torch.no_grad():
            logits = model(**token_batch()).logits
        torch.testing.assert_close(logits, torch.load({str(tmp_path / "logits.pt")!r}), rtol=1e-4, atol=1e-4)
    """)


def test_another_adapter_keeps_its_layers_and_its_place():
    base = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "other")
    randomize(base)
    expected = logits(base)
    base.add_adapter("fim", fim_lora_config(r_min=0, target_modules=("q_proj", "v_proj")))
    base.set_adapter("fim")
    scores, dropped = half(base, "fim")
    initialize_lora_fim_ranks(base, fim_scores=scores, adapter_name="fim")
    assert adapted_layers(base, "fim") == set(scores) - dropped
    assert adapted_layers(base, "other") == set(scores)
    assert torch.equal(logits(base), logits(llama()))
    assert not any(p.requires_grad for name, p in base.named_parameters() if ".other." in name)
    base.set_adapter("other")
    assert torch.equal(logits(base), expected)


def test_a_failing_call_keeps_the_layers_that_would_be_dropped():
    model = fim_model(r_min=0)
    randomize(model)
    layers, output = lora_layers(model), logits(model)
    before = state_of(model)

    names = list(layers)
    scores = scores_without(names, names[:2])
    with running_out_of_memory(layers[names[-1]]):
        initialize_lora_fim_ranks(model, fim_scores=scores, discard_weights=True)
    assert state_of(model) == before
    assert torch.equal(logits(model), output)
    allocation = initialize_lora_fim_ranks(model, fim_scores=scores, discard_weights=True)
    assert set(allocation.dropped_layers) == set(names[:2])


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
    assert adapted_layers(get_peft_model(llama(), allocation.to_lora_config(config))) == set(scores) - dropped
    allocation.save(tmp_path / "allocation.json")
    assert RankAllocation.load(tmp_path / "allocation.json") == allocation
    draw_rank_map(allocation, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_training_does_not_touch_dropped_layers_and_the_config_survives_a_copy():
    model = fim_model(r_min=0)
    names = list(lora_layers(model))
    allocation = initialize_lora_fim_ranks(model, fim_scores=scores_without(names, names[::2]))
    again = copy.deepcopy(model.peft_config["default"])
    assert lora_layers(get_peft_model(llama(), again)).keys() == set(names[1::2])
    assert RankAllocation.from_dict(allocation.to_dict()).dropped_layers == names[::2]


# --- Parameters ---


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


def test_both_parameters_of_a_module_dropped(tmp_path):
    torch.manual_seed(1)
    config = fim_lora_config(r=2, r_min=0, target_modules=("first",), target_parameters=TARGETS)
    model = get_peft_model(Mixture(), config)
    initialize_lora_fim_ranks(model, fim_scores=dict.fromkeys(TARGETS, 0.0) | {"first": 1.0})
    experts = model.base_model.model.experts
    assert experts.state_dict().keys() == Mixture().experts.state_dict().keys()
    assert type(experts).__name__ == "Experts"
    randomize(model)
    x, target = torch.randn(2, 7, WIDTH), torch.rand(2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Mixture(), tmp_path)
    torch.testing.assert_close(loaded(x, target)["loss"], model(x, target)["loss"])


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.zeta, self.alpha, self.middle = (nn.Parameter(torch.randn(2, WIDTH, WIDTH)) for _ in range(3))

    def forward(self, x):
        return x @ self.zeta[0] @ self.alpha[1] + x @ self.middle.sum(0)


@pytest.mark.parametrize("dropped", [["zeta"], ["alpha"], ["middle"], ["zeta", "middle"]])
def test_one_of_three_nested_parameters_dropped(tmp_path, dropped):
    names = [f"0.{name}" for name in ("zeta", "alpha", "middle")]
    dropped = {f"0.{name}" for name in dropped}
    config = fim_lora_config(r=2, r_min=0, target_modules=(), target_parameters=names)
    model = get_peft_model(nn.Sequential(Three()), config)
    allocation = initialize_lora_fim_ranks(model, fim_scores=scores_without(names, dropped))
    assert set(allocation.dropped_layers) == dropped
    x = torch.randn(4, WIDTH)
    torch.testing.assert_close(model(x), Three()(x))
    randomize(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(nn.Sequential(Three()), tmp_path)
    torch.testing.assert_close(loaded(x), model(x))
    assert (model(x) - Three()(x)).abs().max() > 0.1


@pytest.mark.parametrize("dropped", TARGETS)
def test_a_nested_parameter_that_stays_is_trained_also_with_biases(dropped):
    config = fim_lora_config(r=2, r_min=0, target_modules=(), target_parameters=TARGETS, bias="lora_only")
    model = get_peft_model(Mixture(), config)
    initialize_lora_fim_ranks(model, fim_scores=scores_without(TARGETS, [dropped]))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(name.split(".")[-3] for name in trained) == ["lora_A", "lora_B"]


# --- nn.MultiheadAttention ---


def test_attention_of_rank_zero_is_plain_again():
    config = fim_lora_config(r=4, r_min=0, target_modules=("attention", "first"))
    model = get_peft_model(Attention(first=False), config)
    initialize_lora_fim_ranks(model, fim_scores={"attention": 0.0, "first": 1.0})
    plain = model.base_model.model.attention
    assert type(plain) is torch.nn.MultiheadAttention
    assert plain.state_dict().keys() == Attention(first=False).attention.state_dict().keys()
    batch = attention_batches()[0]
    torch.testing.assert_close(model(**batch)["loss"], Attention(first=False)(**batch)["loss"])


def test_attention_dropped_beside_another_adapter():
    model = get_peft_model(
        Attention(first=False), fim_lora_config(r=4, target_modules=("attention", "first")), "other"
    )
    initialize_lora_fim_ranks(model, fim_scores={"attention": 1.0, "first": 2.0}, adapter_name="other")
    randomize(model)
    batch = attention_batches()[0]
    with torch.no_grad():
        expected = model.eval()(**batch)["loss"]
    model.add_adapter("fim", fim_lora_config(r=4, r_min=0, target_modules=("attention", "first")))
    model.set_adapter("fim")
    initialize_lora_fim_ranks(model, fim_scores={"attention": 0.0, "first": 1.0}, adapter_name="fim")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch)["loss"], Attention(first=False).eval()(**batch)["loss"])
        model.set_adapter("other")
        torch.testing.assert_close(model(**batch)["loss"], expected)
