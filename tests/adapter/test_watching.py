"""An adapter that awaits its ranks watches its model: when its hooks come and go."""

import copy
import pickle

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import nn

from fim_lora import get_fim_scores, initialize_lora_fim_ranks
from fim_lora.adapter.watching import WatchedAdapter, watched_adapter
from helpers.adapters import fim_lora_config, fim_model, hooks_of, run_own_loop, state_of
from helpers.tiny_models import llama, lm_batches


def test_hooks_stop_and_go_without_an_allocation():
    model = fim_model(batches=2)
    assert hooks_of(model)
    run_own_loop(model)
    assert not hooks_of(model)
    assert initialize_lora_fim_ranks(model).num_batches == 2


@pytest.mark.filterwarnings("ignore:This adapter never got its FIM ranks")
def test_copies_pickles_and_checkpoints_of_a_model_with_hooks(tmp_path):
    model = fim_model()
    run_own_loop(model, lm_batches()[:1])
    clones = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    model.save_pretrained(tmp_path)
    assert hooks_of(model)
    for clone in clones:
        run_own_loop(clone, lm_batches()[1:])
        assert not hooks_of(clone)
    assert hooks_of(model)
    run_own_loop(model, lm_batches()[1:])
    ranks = initialize_lora_fim_ranks(model).ranks
    assert all(initialize_lora_fim_ranks(clone).ranks == ranks for clone in clones)


def test_a_dataloader_does_not_disturb_the_own_loop():
    model = fim_model()
    run_own_loop(model, lm_batches()[:1])
    before = hooks_of(model)
    scores = get_fim_scores(model, lm_batches(), show_progress_bar=False)
    assert hooks_of(model) == before
    run_own_loop(model, lm_batches()[1:])
    allocation = initialize_lora_fim_ranks(model)
    for name, score in scores.items():
        assert allocation.scores[name].mean == pytest.approx(score.mean, rel=1e-5)


def deleted(model):
    model.delete_adapter("default")
    return model.base_model.model  # PEFT does not run a PeftModel without an adapter


REMOVALS = {
    "unload": lambda model: model.unload(),
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "delete_adapter": deleted,
}


@pytest.mark.parametrize("removal", REMOVALS)
@pytest.mark.parametrize("seen", [False, True])
def test_hooks_end_with_the_adapter(removal, seen):
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(6, 5)
    plain = copy.deepcopy(base)
    model = fim_model(base, target_modules=("0", "2"))
    if seen:
        model(x).square().mean().backward()
    model = REMOVALS[removal](model)
    assert not hooks_of(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for one in (compiled, plain):
        one.requires_grad_(True)
        one.zero_grad()
        loss = one(x).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.skipif(Version(peft.__version__) < Version("0.20"), reason="transformers needs a newer PEFT")
def test_hooks_end_with_an_adapter_that_transformers_deletes():
    model = llama()
    model.add_adapter(fim_lora_config(), "first")
    alone = hooks_of(model)
    model.add_adapter(fim_lora_config(), "second")
    model.set_adapter(["first", "second"])
    assert len(hooks_of(model)) > len(alone)
    model.delete_adapter("second")
    assert hooks_of(model) == alone
    run_own_loop(model)
    assert initialize_lora_fim_ranks(model, adapter_name="first").num_batches == 3
    assert not hooks_of(model)


def test_a_removed_adapter_of_the_same_name_leaves_nothing_to_the_next():
    model = fim_model()
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(target_modules=["q_proj"]))
    assert watched_adapter(model, "default") == WatchedAdapter(None, None)
    assert not hooks_of(model)


def test_an_adapter_unloaded_before_its_allocation_leaves_no_hooks_to_the_next():
    model = fim_model()
    base = model.unload()
    model = get_peft_model(base, fim_lora_config())
    run_own_loop(model)
    assert not hooks_of(model)
    initialize_lora_fim_ranks(model)
    assert not any(name.startswith("_fim") for module in model.modules() for name in vars(module))


def test_a_calibration_of_one_adapter_is_none_of_another_that_waits():
    model = fim_model()
    model.add_adapter("other", fim_lora_config())
    initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="No calibration batch was seen"):
        initialize_lora_fim_ranks(model, adapter_name="other")
    assert state_of(model) == before
    run_own_loop(model)
    by_own_loop = initialize_lora_fim_ranks(model, adapter_name="other").scores
    expected = get_fim_scores(llama(), lm_batches(), fim_lora_config(), show_progress_bar=False)
    for name, score in expected.items():
        assert by_own_loop[name].mean == pytest.approx(score.mean, rel=1e-5)
