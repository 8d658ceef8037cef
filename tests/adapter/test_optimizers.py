"""An optimizer that was built before the allocation."""

import pytest
import torch

from fim_lora import initialize_lora_fim_ranks
from helpers.adapters import adapted_layers, fim_model, logits, lora_layers, run_own_loop, scores_without
from helpers.tiny_models import llama, lm_batches, token_batch


def test_an_optimizer_built_before_trains_the_new_weights():
    model = fim_model(r_max=16)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    run_own_loop(model)
    initialize_lora_fim_ranks(model)
    assert {name: p for name, p in model.named_parameters() if p.requires_grad} == parameters
    assert all(p.grad is None for p in parameters.values())

    before = {name: p.detach().clone() for name, p in parameters.items()}
    for _ in range(2):
        loss = model(**token_batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(p, before[name]) for name, p in parameters.items())
    assert model(**token_batch()).loss < loss


@pytest.mark.filterwarnings("ignore:Adapter 'default' is trained without FIM ranks")
def test_an_optimizer_that_has_stepped_raises_instead_of_training_stale_state():
    model = fim_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for batch in lm_batches():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    initialize_lora_fim_ranks(model, discard_weights=True)
    model(**token_batch()).loss.backward()
    with pytest.raises(RuntimeError, match="size of tensor"):
        optimizer.step()


def test_hooks_and_an_optimizer_of_before():
    model = fim_model(r_min=0, r_max=32, score_exponent=4.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    run_own_loop(model)
    allocation = initialize_lora_fim_ranks(model)
    assert allocation.dropped_layers
    model(**token_batch()).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in trained} == adapted_layers(model)
    optimizer.step()
    assert not torch.equal(logits(model), logits(llama()))


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
