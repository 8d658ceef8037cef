"""Target layers are those of PEFT, and unsupported ones are named before anything is changed."""

import copy

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fim_lora import get_fim_scores
from fim_lora.adapter.targets import resolve_targets
from helpers.adapters import fim_lora_config, lora_layers
from helpers.tiny_models import bert, gpt2, llama, lm_batches, t5


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "layers.1.mlp.up_proj"]},
        {"target_modules": r".*layers\.0.*(k|v)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.1.*"},
        {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {},
    ],
)
def test_targets_are_those_of_peft_and_no_adapter_is_created(options):
    base = llama()
    base.model.embed_tokens.weight.requires_grad_(False)
    modules = dict(base.named_modules())
    flags = [parameter.requires_grad for parameter in base.parameters()]
    config = LoraConfig(**options)
    before = copy.deepcopy(config)
    scores = get_fim_scores(base, lm_batches(8), config, show_progress_bar=False)
    assert config == before
    assert dict(base.named_modules()) == modules
    assert [parameter.requires_grad for parameter in base.parameters()] == flags
    assert not hasattr(base, "peft_config")
    assert list(scores) == list(lora_layers(get_peft_model(llama(), LoraConfig(**options))))


def test_targets_by_default_of_other_architectures():
    for base in (gpt2(), t5(), bert()):
        expected = lora_layers(get_peft_model(copy.deepcopy(base), LoraConfig()))
        assert list(resolve_targets(base, LoraConfig())) == list(expected)
    options = {"target_modules": "all-linear", "task_type": "SEQ_CLS"}
    expected = lora_layers(get_peft_model(bert(), LoraConfig(**options)))
    assert list(resolve_targets(bert(), LoraConfig(**options))) == list(expected)


def test_nothing_targeted_is_an_error_of_peft():
    with pytest.raises(ValueError, match="not found in the base model"):
        get_fim_scores(llama(), lm_batches(), LoraConfig(target_modules=["nothing"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["q_proj", "vproj"]},
            r"^'vproj' in target_modules matches nothing in the model: remove or correct it. Near it are 'v_proj'",
        ),
        ({"target_modules": ["mlp.down_proj", "self_attn.vproj"]}, "Near it are 'self_attn.v_proj'"),
        (
            {"target_modules": ["q_proj", "xyz"]},
            "'xyz' in target_modules matches nothing in the model: .* correct it.$",
        ),
        (
            {"target_modules": ["q_proj"], "target_parameters": ["v_proj.weight", "v_proj.wait"]},
            "'v_proj.wait' in target_parameters matches nothing .* Near it are 'v_proj.weight'",
        ),
    ],
)
def test_an_entry_that_matches_nothing_is_named_with_what_is_near(options, message):
    """PEFT ignores it if another entry matches."""
    model = llama()
    with pytest.raises(ValueError, match=message):
        get_fim_scores(model, lm_batches(), LoraConfig(**options))
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, LoraConfig(init_lora_weights="fim", **options))
    assert not lora_layers(model)
    get_peft_model(model, LoraConfig(**options))  # other initializations are as they were


class UnknownLora(nn.Module, LoraLayer):
    """A custom LoRA layer that was registered with PEFT for a custom layer."""

    def __init__(self, base_layer, adapter_name, r=0, **kwargs):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.r[adapter_name] = r


@pytest.mark.parametrize("existing_adapter", [False, True])
def test_an_unsupported_layer_is_named_before_anything_is_changed_or_read(existing_adapter):
    base = llama()
    if existing_adapter:
        base = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    modules, flags = dict(base.named_modules()), [p.requires_grad for p in base.parameters()]
    config = fim_lora_config(target_modules=("q_proj", "input_layernorm"))
    config._register_custom_module({LlamaRMSNorm: UnknownLora})
    message = r"'model\.layers\.0\.input_layernorm' is a transformers.*RMSNorm.*`exclude_modules`"
    if existing_adapter:
        with pytest.raises(TypeError, match=message):
            base.add_adapter("fim", config)
    else:
        with pytest.raises(TypeError, match=message):
            get_peft_model(base, config)
        with pytest.raises(TypeError, match=message):
            get_fim_scores(base, iter(lambda: pytest.fail("data was read"), None), config)
    assert dict(base.named_modules()) == modules
    assert [p.requires_grad for p in base.parameters()] == flags
