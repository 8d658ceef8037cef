"""`r_min=0`, beyond tests/test_rank_zero.py."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from fim_lora import RankAllocation, initialize_lora_fim_ranks
from test_initialization import fim_lora_config, fim_model, logits, lora_layers, randomise, run_own_loop, state_of
from test_layer_types import TARGETS, WIDTH, Attention, Mixture, attention_batches
from test_stock_peft import stock
from tiny_models import llama, running_out_of_memory, token_batch


def scores_without(layers, dropped):
    return {name: 0.0 if name in dropped else 1.0 + index % 3 for index, name in enumerate(layers)}


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
    randomise(model)
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


def test_an_optimizer_of_before_leaves_dropped_parameters_alone():
    model = fim_model(r_min=0)
    layers = lora_layers(model)
    dropped = set(list(layers)[:3])
    parameters = {name: [p for key, p in layer.named_parameters() if "lora_" in key] for name, layer in layers.items()}
    optimizer = torch.optim.AdamW([p for group in parameters.values() for p in group], lr=0.1, weight_decay=0.5)
    run_own_loop(model)
    bases = {name: layers[name].get_base_layer() for name in dropped}
    weights = {name: base.weight for name, base in bases.items()}
    initialize_lora_fim_ranks(model, fim_scores=scores_without(layers, dropped))
    before = {name: [p.detach().clone() for p in group] for name, group in parameters.items()}
    for _ in range(2):
        model(**token_batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, group in parameters.items():
        moved = [not torch.equal(p, old) for p, old in zip(group, before[name], strict=True)]
        assert moved == [name not in dropped] * 2
    for name in dropped:
        plain = model.get_submodule(f"base_model.model.{name}")
        assert plain is bases[name]
        assert plain.weight is weights[name]
        assert torch.equal(plain.weight, llama().get_submodule(name).weight)


def test_a_failing_call_keeps_the_layers_that_would_be_dropped():
    model = fim_model(r_min=0)
    randomise(model)
    layers, output = lora_layers(model), logits(model)
    before = state_of(model)

    names = list(layers)
    with running_out_of_memory(layers[names[-1]]):
        initialize_lora_fim_ranks(model, fim_scores=scores_without(names, names[:2]))
    assert state_of(model) == before
    assert torch.equal(logits(model), output)
    assert set(initialize_lora_fim_ranks(model, fim_scores=scores_without(names, names[:2])).dropped_layers) == set(
        names[:2]
    )


def test_both_parameters_of_a_module_dropped(tmp_path):
    torch.manual_seed(1)
    config = fim_lora_config(r=2, r_min=0, target_modules=("first",), target_parameters=TARGETS)
    model = get_peft_model(Mixture(), config)
    initialize_lora_fim_ranks(model, fim_scores=dict.fromkeys(TARGETS, 0.0) | {"first": 1.0})
    experts = model.base_model.model.experts
    assert experts.state_dict().keys() == Mixture().experts.state_dict().keys()
    assert type(experts).__name__ == "Experts"
    randomise(model)
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
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(nn.Sequential(Three()), tmp_path)
    torch.testing.assert_close(loaded(x), model(x))
    assert (model(x) - Three()(x)).abs().max() > 0.1


def test_attention_dropped_beside_another_adapter():
    model = get_peft_model(
        Attention(first=False), fim_lora_config(r=4, target_modules=("attention", "first")), "other"
    )
    initialize_lora_fim_ranks(model, fim_scores={"attention": 1.0, "first": 2.0}, adapter_name="other")
    randomise(model)
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


def test_training_does_not_touch_dropped_layers_and_the_config_survives_a_copy():
    model = fim_model(r_min=0)
    names = list(lora_layers(model))
    allocation = initialize_lora_fim_ranks(model, fim_scores=scores_without(names, names[::2]))
    again = copy.deepcopy(model.peft_config["default"])
    assert lora_layers(get_peft_model(llama(), again)).keys() == set(names[1::2])
    assert RankAllocation.from_dict(allocation.to_dict()).dropped_layers == names[::2]


@pytest.mark.parametrize("dropped", TARGETS)
def test_a_nested_parameter_that_stays_is_trained_also_with_biases(dropped):
    config = fim_lora_config(r=2, r_min=0, target_modules=(), target_parameters=TARGETS, bias="lora_only")
    model = get_peft_model(Mixture(), config)
    initialize_lora_fim_ranks(model, fim_scores=scores_without(TARGETS, [dropped]))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(name.split(".")[-3] for name in trained) == ["lora_A", "lora_B"]
