"""Adapters that await their ranks on tiny models, and what tests read from a model with an adapter."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper

from fim_lora import FimConfig
from helpers.proportional import proportional
from helpers.tiny_models import llama, lm_batches, token_batch


def fim_lora_config(r=8, batches=3, target_modules=("q_proj", "v_proj", "down_proj"), **options):
    fim_options = {key: options.pop(key) for key in list(options) if key in FimConfig.__dataclass_fields__}
    target_modules = list(target_modules) if isinstance(target_modules, tuple) else target_modules
    return LoraConfig(
        r=r,
        init_lora_weights="fim",
        fim_config=proportional(fim_calibration_batches=batches, **fim_options),
        target_modules=target_modules,
        **options,
    )


def fim_model(base=None, **options):
    torch.manual_seed(1)
    return get_peft_model(llama() if base is None else base, fim_lora_config(**options))


def run_own_loop(model, batches=None):
    for batch in batches or lm_batches():
        model(**batch).loss.backward()


def lora_layers(model, adapter="default"):
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.r
    }


def hooks_of(model):
    return [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]


def logits(model, batch=None):
    model.eval()
    with torch.no_grad():
        return model(**(batch or token_batch())).logits


def randomize(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)


def state_of(model):
    config = model.peft_config["default"]
    return (
        {name: (id(module), module.training) for name, module in model.named_modules()},
        {name: (id(p), p.requires_grad, p.shape) for name, p in model.named_parameters()},
        {
            name: (dict(layer.r), dict(layer.scaling), dict(layer.lora_alpha))
            for name, layer in lora_layers(model).items()
        },
        [layer.disable_adapters for layer in lora_layers(model).values()],
        copy.deepcopy(config.__dict__),
        hooks_of(model),
    )


def ranks_in(model):
    """Name in the base model to rank, read from the layers that PEFT adapted."""
    ranks = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            name = name.removeprefix("base_model.model.")
            if isinstance(module, ParamWrapper):  # nested if a module has several parameters
                name = f"{name.replace('.base_layer', '')}.{module.parameter_name}"
            ranks[name] = module.r["default"]
    return ranks


def adapted_layers(model, adapter="default"):
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and adapter in module.r
    }


def scores_without(layers, dropped):
    return {name: 0.0 if name in dropped else 1.0 + index % 3 for index, name in enumerate(layers)}
