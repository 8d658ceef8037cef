"""Errors of `initialize_lora_fim_ranks`, which leave the model unchanged."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from fim_lora import FimConfig, FimScores, LayerScore, get_fim_scores, initialize_lora_fim_ranks
from helpers.adapters import fim_model, logits, lora_layers, randomize, run_own_loop, state_of
from helpers.tiny_models import llama, lm_batches, running_out_of_memory, token_batch


def failing_loader():
    yield token_batch()
    raise OSError("disk")


NAMES = list(lora_layers(get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"]))))
ONES = dict.fromkeys(NAMES, 1.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, RuntimeError, "No calibration batch was seen"),
        ({"adapter_name": "other"}, ValueError, r"no adapter 'other'; it has \['default'\]"),
        ({"dataloader": [], "fim_scores": {}}, ValueError, "Both `dataloader` and `fim_scores`"),
        ({"dataloader": []}, ValueError, "yielded no batch"),
        ({"dataloader": failing_loader()}, OSError, "disk"),
        ({"fim_scores": dict(list(ONES.items())[1:])}, ValueError, rf"lacks 1 of 6 target layers: \['{NAMES[0]}'\]"),
        ({"fim_scores": ONES | {"lm_head": 1.0}}, ValueError, r"names 1 layers .* \['lm_head'\]"),
        ({"fim_scores": ONES | {NAMES[2]: float("nan")}}, ValueError, f"'{NAMES[2]}' cannot be used.*nan"),
        ({"fim_scores": ONES | {NAMES[2]: torch.tensor([1.0, float("inf")])}}, ValueError, f"'{NAMES[2]}'.*inf"),
        ({"fim_scores": ONES | {NAMES[2]: -1.0}}, ValueError, f"'{NAMES[2]}'.*-1.0"),
        ({"fim_scores": dict.fromkeys(NAMES, 0.0)}, ValueError, "Every score in `fim_scores` is zero"),
    ],
)
def test_errors_leave_no_trace(arguments, error, message):
    model = fim_model()
    before = state_of(model)
    with pytest.raises(error, match=message):
        initialize_lora_fim_ranks(model, show_progress_bar=False, **arguments)
    assert state_of(model) == before
    run_own_loop(model)
    initialize_lora_fim_ranks(model)


def test_a_failure_while_layers_are_rebuilt_leaves_no_trace():
    model = fim_model(lora_dropout=0.1, use_dora=True)
    randomize(model)
    run_own_loop(model)
    before, output = state_of(model), logits(model)
    before = state_of(model)
    with running_out_of_memory(list(lora_layers(model).values())[-1]):
        initialize_lora_fim_ranks(model, discard_weights=True)
    assert state_of(model) == before
    assert torch.equal(logits(model), output)
    initialize_lora_fim_ranks(model, discard_weights=True)


MERGED_CALLS = {
    "own loop": lambda model: initialize_lora_fim_ranks(model, discard_weights=True),
    "dataloader": lambda model: initialize_lora_fim_ranks(
        model, lm_batches(), show_progress_bar=False, discard_weights=True
    ),
    "given scores": lambda model: initialize_lora_fim_ranks(model, fim_scores=ONES, discard_weights=True),
    "scores": lambda model: get_fim_scores(model, lm_batches(), show_progress_bar=False),
}


@pytest.mark.parametrize("merged", ["default", "other"])
@pytest.mark.parametrize("call", MERGED_CALLS)
def test_merged_adapters_are_refused(call, merged):
    """The reference is a model without any merge."""

    def make():
        model = fim_model()
        model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj", "o_proj"]))
        run_own_loop(model)
        randomize(model)
        return model

    model = make()
    model.merge_adapter([merged])
    before, weights = state_of(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"\['{merged}'\] are merged .* 'model\.layers\.0\..*unmerge_adapter\(\)"):
        MERGED_CALLS[call](model)
    assert state_of(model) == before
    assert model.base_model.model.model.layers[0].self_attn.v_proj.merged_adapters == [merged]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    model.unmerge_adapter()
    result, expected = MERGED_CALLS[call](model), MERGED_CALLS[call](untouched := make())
    for one, other in zip(*(getattr(found, "scores", found).values() for found in (result, expected)), strict=True):
        assert one.mean == pytest.approx(other.mean, rel=1e-4)
    torch.testing.assert_close(logits(model), logits(untouched), rtol=1e-4, atol=1e-4)
    if call != "scores":
        torch.testing.assert_close(logits(model), logits(llama()), rtol=1e-4, atol=1e-4)


def test_only_an_adapter_that_waits_is_allocated():
    model = fim_model()
    initialize_lora_fim_ranks(model, fim_scores=ONES)
    with pytest.raises(ValueError, match="does not await FIM allocation: it has init_lora_weights=True"):
        initialize_lora_fim_ranks(model, fim_scores=ONES)
    with pytest.raises(ValueError, match="The model has no adapter"):
        initialize_lora_fim_ranks(llama(), fim_scores=ONES)
    with pytest.raises(ValueError, match="pass a LoraConfig"):
        get_fim_scores(llama(), lm_batches())


@pytest.mark.parametrize("bounds", [{"r_min": 9}, {"r_max": 7}])
def test_infeasible_bounds_name_a_layer(bounds):
    model = fim_model()
    model.peft_config["default"].fim_config = FimConfig(**bounds)  # after the config was checked
    before = state_of(model)
    with pytest.raises(ValueError, match=r"Layer 'model\.layers.*' has base rank 8"):
        initialize_lora_fim_ranks(model, fim_scores=ONES)
    assert state_of(model) == before


def test_given_layer_scores_keep_their_errors():
    base = llama()
    shapes = {name: tuple(base.get_submodule(name).weight.shape) for name in NAMES}
    scores = FimScores({name: LayerScore(1.0, 0.5, 7, shape) for name, shape in shapes.items()}, num_batches=2)
    allocation = initialize_lora_fim_ranks(fim_model(), fim_scores=scores)
    assert (allocation.num_batches, allocation.num_examples) == (2, 7)
    assert allocation.scores[NAMES[0]].standard_error == 0.5


def test_scores_of_a_model_with_other_shapes_are_refused_and_their_means_are_not():
    wider = llama(head_dim=8)
    scores = get_fim_scores(wider, lm_batches(), fim_model().peft_config["default"], show_progress_bar=False)
    model = fim_model()
    before = state_of(model)
    message = rf"'{NAMES[0]}' was measured on another layer: its shape is \(32, 24\), and .* is \(24, 24\)"
    with pytest.raises(ValueError, match=message):
        initialize_lora_fim_ranks(model, fim_scores=scores)
    assert state_of(model) == before
    allocation = initialize_lora_fim_ranks(model, fim_scores=scores.means)
    trained = sum(weight.numel() for name, weight in model.named_parameters() if "lora_" in name)
    assert allocation.num_parameters == trained


def test_two_adapters_of_one_config_object_are_refused():
    # TRL's DPOTrainer makes its reference adapter of a PeftModel in this way.
    model = fim_model()
    model.add_adapter("ref", model.peft_config["default"])
    before = state_of(model)
    with pytest.raises(ValueError, match="'ref' was made from the same config object as 'default'"):
        initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)
    assert state_of(model) == before
