"""What people do with an adapter of unequal ranks: merge it, combine it, swap it."""

import copy

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict
from safetensors.torch import load_file

from fim_lora import initialize_lora_fim_ranks
from test_initialization import fim_lora_config, fim_model, logits, randomise
from tiny_models import llama

TARGETS = ("q_proj", "v_proj", "down_proj")


def scores(model, shift=0):
    names = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    return {name: 1.0 + (index + shift) % 3 for index, name in enumerate(names)}


def trained(adapter_names=("default",), **options):
    model = fim_model(score_exponent=1.0, target_modules=TARGETS, **options)
    initialize_lora_fim_ranks(model, fim_scores=scores(model))
    for shift, name in enumerate(adapter_names[1:], start=1):
        model.add_adapter(name, fim_lora_config(target_modules=TARGETS, **options))
        initialize_lora_fim_ranks(model, fim_scores=scores(model, shift), adapter_name=name)
    randomise(model)
    return model


def deltas(model, adapter="default"):
    """`scaling_i · B_i A_i` from the tensors, without PEFT's own function for it."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    return {
        name: layer.scaling[adapter] * layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight
        for name, layer in layers.items()
    }


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_merging_gives_the_same_model(options):
    model = trained(**options)
    expected, delta = logits(model), deltas(model)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)
    assert not any(hasattr(module, "lora_A") for module in merged.modules())
    if "use_dora" not in options:
        for name, change in delta.items():
            base = llama().get_submodule(name.removeprefix("base_model.model.")).weight
            weight = merged.get_submodule(name.removeprefix("base_model.model.")).weight
            torch.testing.assert_close(weight, base + change, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("combination", "options"), [("cat", {}), ("svd", {"svd_rank": 24})])
def test_adapters_of_unequal_ranks_can_be_combined(combination, options):
    model = trained(("default", "other"))
    first, second = deltas(model), deltas(model, "other")
    model.add_weighted_adapter(["default", "other"], [0.7, 0.5], "both", combination_type=combination, **options)
    for name, delta in deltas(model, "both").items():
        torch.testing.assert_close(delta, 0.7 * first[name] + 0.5 * second[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("combination", ["linear", "ties", "dare_linear", "magnitude_prune"])
def test_combinations_that_need_equal_ranks_are_refused_by_peft(combination):
    model = trained(("default", "other"))
    with pytest.raises((ValueError, RuntimeError)):
        model.add_weighted_adapter(["default", "other"], [0.7, 0.5], "both", combination_type=combination, density=0.5)


def saved_pair(tmp_path, **options):
    for folder, shift in (("one", 0), ("two", 1)):
        model = fim_model(score_exponent=1.0, target_modules=TARGETS, **options)
        initialize_lora_fim_ranks(model, fim_scores=scores(model, shift))
        randomise(model)
        model.save_pretrained(tmp_path / folder)
    load = PeftModel.from_pretrained
    return load(llama(), tmp_path / "one").eval(), load(llama(), tmp_path / "two").eval()


def test_hot_swapping_with_the_common_scaling(tmp_path):
    """PEFT looks no pattern up there, so the one global scaling has to be right for every layer, and is."""
    model, second = saved_pair(tmp_path)
    with pytest.raises(ValueError, match="alpha_pattern"):
        hotswap_adapter(model, tmp_path / "two", "default")
    tensors = load_file(tmp_path / "two" / "adapter_model.safetensors")
    tensors = {name.replace(".weight", ".default.weight"): value for name, value in tensors.items()}
    config = copy.copy(second.peft_config["default"])
    config.rank_pattern = config.alpha_pattern = {}
    hotswap_adapter_from_state_dict(model, tensors, "default", config)
    torch.testing.assert_close(logits(model), logits(second), rtol=1e-4, atol=1e-4)
