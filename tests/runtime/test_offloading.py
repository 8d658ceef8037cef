"""Layers that Accelerate offloads to the host or to the disk."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook
from peft import get_peft_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from fim_lora import get_fim_scores, initialize_lora_fim_ranks
from helpers.llama_calibration import (
    adapter_state,
    assert_scores,
    assert_trains_alike,
    fim_config,
    fim_model,
    reference,
    truth_of,
)
from helpers.tiny_models import VOCABULARY, llama, lm_batches, number_of_terms, sum_of_losses

HOST = torch.device("cpu")


def dispatched(model, folder):
    model.config.use_cache = False
    places = {"embed_tokens": "cpu", "layers.0": "disk", "layers.1": "cpu", "norm": "cpu", "rotary_emb": "cpu"}
    device_map = {f"model.{name}": place for name, place in places.items()} | {"lm_head": "disk"}
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=folder)


OFFLOADING = {
    "device_map": dispatched,
    "cpu_offload": lambda model, folder: cpu_offload(model, execution_device=HOST),
    "disk_offload": lambda model, folder: disk_offload(model, folder, execution_device=HOST),
}


def offloaded_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.device.type == "meta"}


def base_weights(model):
    """The weights that Accelerate would load, by name in the base model."""
    return {
        f"{name.removeprefix('base_model.model.').removesuffix('.base_layer')}.{key}": module._hf_hook.weights_map[key]
        for name, module in model.named_modules()
        if isinstance(getattr(module, "_hf_hook", None), AlignDevicesHook) and module._hf_hook.offload
        for key, parameter in module._parameters.items()
        if parameter is not None
    }


@pytest.mark.parametrize("how", OFFLOADING)
def test_scores_of_an_offloaded_model(how, tmp_path):
    batches = lm_batches(2)
    model = OFFLOADING[how](llama(2), tmp_path)
    before = offloaded_names(model)
    assert "model.layers.0.self_attn.q_proj.weight" in before
    scores = get_fim_scores(model, batches, fim_config(), show_progress_bar=False)
    assert_scores(scores, truth_of(batches, layers=2))
    assert scores == get_fim_scores(llama(2), batches, fim_config(), show_progress_bar=False)
    assert offloaded_names(model) == before


@pytest.mark.parametrize("how", OFFLOADING)
@pytest.mark.parametrize("use_dataloader", [False, True])
def test_ranks_and_training_of_an_offloaded_model(how, use_dataloader, tmp_path):
    batches, expected = lm_batches(2), reference(layers=2)
    base = OFFLOADING[how](llama(2), tmp_path)
    hooks = {id(module): module._hf_hook for module in base.modules() if hasattr(module, "_hf_hook")}
    model = fim_model(base)
    before = offloaded_names(model)
    assert before
    assert not any("lora_" in name for name in before)
    if use_dataloader:
        allocation = initialize_lora_fim_ranks(model, batches, show_progress_bar=False)
    else:
        for batch in batches:
            model(**batch).loss.backward()
        allocation = initialize_lora_fim_ranks(model)

    assert allocation.ranks == expected.ranks
    assert_scores(allocation.scores, truth_of(batches, layers=2))
    assert {parameter.device for parameter in adapter_state(model).values()} == {HOST}
    assert offloaded_names(model) == before
    assert {id(module): module._hf_hook for module in model.modules() if id(module) in hooks} == hooks
    original, loaded = dict(llama(2).named_parameters()), base_weights(model)
    assert len(loaded) == len(before)
    assert all(torch.equal(value, original[name]) for name, value in loaded.items())

    other = get_peft_model(llama(2), allocation.to_lora_config(fim_config()))
    assert_trains_alike(model, other, batches[0])
    assert offloaded_names(model) == before


def test_offloaded_layers_under_gradient_checkpointing(tmp_path):
    """The weights of a block are loaded a second time, for its backward pass."""
    batches = lm_batches(2)
    model = fim_model(disk_offload(llama(2), tmp_path, execution_device=HOST)).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for batch in batches:
        model(**batch).loss.backward()
    assert_scores(initialize_lora_fim_ranks(model).scores, truth_of(batches, layers=2))


def mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return MixtralForCausalLM(config)


def test_scores_of_offloaded_experts():
    """Experts are run again for every example, after their weights have already been dropped."""
    batches, names = lm_batches(2), ["experts.gate_up_proj", "experts.down_proj"]
    config = fim_config(target_modules=["q_proj"], target_parameters=names)
    model = cpu_offload(mixtral(), execution_device=HOST)
    scores = get_fim_scores(model, batches, config, show_progress_bar=False)

    double = mixtral().double().eval()
    double.set_experts_implementation("eager")  # the other implementations do not support float64
    names = [f"model.layers.0.mlp.{name}" for name in names]
    values = {name: [] for name in names}
    for batch in batches:
        for row in range(len(batch["labels"])):
            share = sum_of_losses(double, batch, slice(row, row + 1)) * len(batch["labels"])
            share = share / number_of_terms(double, batch)
            for name, gradient in zip(
                names, torch.autograd.grad(share, [double.get_parameter(name) for name in names]), strict=True
            ):
                values[name].append(gradient.square().mean())
    assert_scores({name: scores[name] for name in names}, {name: torch.stack(value) for name, value in values.items()})
    assert offloaded_names(model) == {name for name, _ in model.named_parameters()}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.first(x)
        return {"loss": self.attention(x, x, x, need_weights=False)[0].square().sum((1, 2)).mean()}


def test_scores_of_offloaded_attention():
    torch.manual_seed(1)
    batch = {"x": torch.randn(3, 5, 8)}
    model = cpu_offload(Attention(), execution_device=HOST, preload_module_classes=["MultiheadAttention"])
    config = fim_config(target_modules=["attention"], batches=1)
    scores = get_fim_scores(model, [batch], config, show_progress_bar=False)
    double = Attention().double()
    weights = [double.attention.in_proj_weight, double.attention.out_proj.weight]
    values = []
    for row in range(3):
        gradients = torch.autograd.grad(double(batch["x"][row : row + 1].double())["loss"], weights)
        values.append(torch.cat([gradient.flatten() for gradient in gradients]).square().mean())
    assert_scores(scores, {"attention": torch.stack(values)})


@pytest.mark.parametrize("final", ["pissa", "olora"])
def test_an_initialization_that_changes_offloaded_weights_is_refused(final, tmp_path):
    model = fim_model(disk_offload(llama(1), tmp_path, execution_device=HOST), final=final)
    before = {name: value.clone() for name, value in adapter_state(model).items()}
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.self_attn\.q_proj' is offloaded: load"):
        initialize_lora_fim_ranks(model, lm_batches(2), show_progress_bar=False)
    assert all(torch.equal(value, before[name]) for name, value in adapter_state(model).items())
    assert initialize_lora_fim_ranks(fim_model(llama(1), final=final), lm_batches(2), show_progress_bar=False)
