"""Which layers are found and selected, in plain models and under adapters, and the errors for wrong names."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers.pytorch_utils import Conv1D

from fim_lora import register_layer_type
from fim_lora.adapter.base_layers import select_base_layers, tied_layers
from fim_lora.fisher.layers.registry import _LAYER_TYPES, WeightShape
from helpers.attention import Attention
from helpers.mixtures import TARGETS, Mixture
from helpers.tiny_models import gpt2, llama

SUPPORTED = (nn.Linear, nn.Embedding, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYER = "model.layers.0.self_attn.q_proj"


def all_supported(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, SUPPORTED)}


@pytest.mark.parametrize("make", [llama, gpt2])
def test_all_layers_by_default(make):
    model = make()
    found = select_base_layers(model, None)
    assert {name: layer.module for name, layer in found.items()} == all_supported(model)
    assert list(found) == list(all_supported(model))  # in the order of the model


def test_names_of_layers_of_weights_and_of_modules_that_contain_layers():
    model = llama()
    names = ["lm_head.weight", LAYER, "model.layers.1.mlp", "base_model.model.model.embed_tokens"]
    assert list(select_base_layers(model, names)) == [
        "lm_head",
        LAYER,
        *(f"model.layers.1.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
        "model.embed_tokens",
    ]
    assert list(select_base_layers(model, iter([LAYER, LAYER]))) == [LAYER]


@pytest.mark.parametrize("adapt", [get_peft_model, lambda model, config: inject_adapter_in_model(config, model)])
def test_layers_of_a_model_with_an_adapter_have_their_names_in_the_base_model(adapt):
    expected = all_supported(llama())
    base = llama()
    config = LoraConfig(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    found = select_base_layers(adapt(base, config), None)
    assert set(found) == set(expected) - {"lm_head"}
    assert type(found[LAYER].module) is nn.Linear
    assert type(found["model.embed_tokens"].module) is nn.Embedding
    with pytest.raises(ValueError, match="'lm_head' of `parameters` belongs to a ModulesToSaveWrapper"):
        select_base_layers(base, ["lm_head"])


def test_wrappers_are_not_part_of_a_name():
    model = llama()
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    assert list(select_base_layers(model, None)) == list(all_supported(llama()))
    given = "model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.weight"
    assert list(select_base_layers(torch.compile(model), [given])) == [LAYER]


def test_parts_that_are_never_called_are_left_out():
    assert list(select_base_layers(Attention(first=False), None)) == ["first"]
    with pytest.raises(ValueError, match=r"'attention.out_proj' of `parameters` belongs to a MultiheadAttention"):
        select_base_layers(Attention(first=False), ["attention.out_proj"])


def test_experts_are_left_out():
    adapted = get_peft_model(Mixture(), LoraConfig(target_modules=[], target_parameters=TARGETS))
    for model in (Mixture(), adapted):
        assert list(select_base_layers(model, None)) == ["first", "router"]
        with pytest.raises(ValueError, match=r"'experts.up' of `parameters` belongs to a (Experts|ParamWrapper)"):
            select_base_layers(model, ["experts.up"])


class Doubled(nn.Linear):
    """Its gradients are not those of a linear layer."""

    def forward(self, x):
        return 2 * super().forward(x)


def shape_of_doubled(layer):
    return WeightShape(layer.out_features, layer.in_features)


def test_a_registered_class_does_not_get_the_function_of_its_base_class():
    model = nn.Sequential(Doubled(3, 3), nn.Linear(3, 3))
    assert list(select_base_layers(model, None)) == ["0", "1"]
    name = f"{Doubled.__module__}.{Doubled.__qualname__}"
    register_layer_type(name, weight_shape=shape_of_doubled)(lambda target, calls, batch_size: torch.ones(batch_size))
    try:
        assert list(select_base_layers(model, None)) == ["1"]
        with pytest.raises(ValueError, match="'0' of `parameters` belongs to a Doubled"):
            select_base_layers(model, ["0"])
    finally:
        del _LAYER_TYPES[name]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            ["model.norm.weight"],
            "'model.norm.weight' of `parameters` belongs to a LlamaRMSNorm and cannot be measured",
        ),
        (["model.norm"], "belongs to a LlamaRMSNorm"),
        ([f"{LAYER}.bias"], f"'{LAYER}.bias' of `parameters` belongs to a Linear"),
        (["model.layers.0.self_attn.q_prj"], f"is not a layer of the model: pass full names, such as '{LAYER}'"),
        (["q_proj"], "'q_proj' of `parameters` is not a layer of the model: pass full names"),
        ([""], "'' of `parameters` is not a layer of the model"),
        ([], "`parameters` is empty"),
    ],
)
def test_names_without_a_diagonal(parameters, message):
    with pytest.raises(ValueError, match=message):
        select_base_layers(llama(), [*parameters])


def test_models_that_cannot_be_measured():
    with pytest.raises(TypeError, match=r"got the string 'lm_head': pass \['lm_head'\]"):
        select_base_layers(llama(), "lm_head")
    with pytest.raises(ValueError, match="contains no linear layer, embedding or convolution"):
        select_base_layers(nn.Sequential(nn.LayerNorm(3)), None)
    adapted = get_peft_model(llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match=f"'{LAYER}' has an adapter of the class Linear, which is not LoRA"):
        select_base_layers(adapted, None)


def test_tied_weights_and_modules_with_two_names():
    model = llama(tie_word_embeddings=True)
    assert tied_layers(model, select_base_layers(model, None)) == ["model.embed_tokens", "lm_head"]
    assert tied_layers(model, [LAYER, "lm_head"]) == ["lm_head"]
    model = nn.Sequential(layer := nn.Linear(3, 3), nn.ReLU(), layer)
    assert list(select_base_layers(model, None)) == ["0"]
    assert list(select_base_layers(model, ["2"])) == ["2"]
    assert tied_layers(model, ["0", "2"]) == []  # one module, all calls of which are measured together
