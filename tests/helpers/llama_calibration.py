"""A tiny Llama with an adapter that awaits its ranks, its true scores, and whether two adapters train alike."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from fim_lora import FimConfig, initialize_lora_fim_ranks
from helpers.tiny_models import llama, lm_batches, names_of, per_example_scores

TARGETS = ("q_proj", "v_proj", "down_proj")


def fim_config(batches=2, **options):
    fim = FimConfig(fim_calibration_batches=batches, init_lora_weights=options.pop("final", True))
    return LoraConfig(init_lora_weights="fim", fim_config=fim, **({"r": 8, "target_modules": list(TARGETS)} | options))


def fim_model(base, **options):
    torch.manual_seed(1)
    return get_peft_model(base, fim_config(**options))


def truth_of(batches, layers=1):
    model = llama(layers)
    return per_example_scores(model, batches, names_of(model, *TARGETS))


def reference(layers=1, batches=None):
    """The allocation of the plain model in float32, on one device, by an own loop."""
    batches = batches or lm_batches(2)
    model = fim_model(llama(layers), batches=len(batches))
    for batch in batches:
        model(**batch).loss.backward()
    return initialize_lora_fim_ranks(model)


def assert_scores(scores, truth, rel=1e-5, factor=1.0):
    assert set(scores) == set(truth)
    for name, values in truth.items():
        assert scores[name].mean == pytest.approx(factor * values.mean().item(), rel=rel), name


def adapter_state(model):
    return {name: value for name, value in model.named_parameters() if "lora_" in name}


def copy_adapter(source, target):
    values = {name.replace("_orig_mod.", ""): value for name, value in adapter_state(source).items()}
    with torch.no_grad():
        for name, parameter in adapter_state(target).items():
            parameter.copy_(values[name.replace("_orig_mod.", "")])


def assert_trains_alike(model, other, batch):
    """One step from the same weights: the same loss, the same gradients, and the loss goes down."""
    copy_adapter(model, other)
    losses = []
    for one in (model, other):
        one.train()
        one.zero_grad()
        optimizer = torch.optim.SGD([value for value in one.parameters() if value.requires_grad], 0.1)
        loss = one(**batch).loss
        loss.backward()
        gradients = {name.replace("_orig_mod.", ""): value.grad.clone() for name, value in adapter_state(one).items()}
        optimizer.step()
        losses.append((loss.detach(), gradients, one(**batch).loss.item()))
    torch.testing.assert_close(losses[0][:2], losses[1][:2], rtol=1e-4, atol=1e-6)
    assert losses[0][2] < losses[0][0].item()
