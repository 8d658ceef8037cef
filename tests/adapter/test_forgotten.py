"""An adapter that is trained or saved without an allocation, or allocated although it was trained."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from fim_lora import initialize_lora_fim_ranks
from fim_lora.adapter import forgotten
from fim_lora.runtime.user_warnings import FimLoraWarning
from helpers.adapters import fim_lora_config, fim_model, logits, lora_layers, randomize, run_own_loop, state_of
from helpers.tiny_models import llama, lm_batches, token_batch

TRAINED = "'default' is trained without FIM ranks"
SAVED = "never got its FIM ranks"


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)


def train(model, optimizer=None, steps=2):
    optimizer = optimizer or adamw(model)
    for _ in range(steps):
        model(**token_batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


COPIES = {
    "the model": lambda model: model,
    "a copy": copy.deepcopy,
    "a pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("copied", COPIES)
def test_training_without_an_allocation_warns_once(copied):
    model = COPIES[copied](fim_model())
    run_own_loop(model)
    with pytest.warns(FimLoraWarning, match=TRAINED) as caught:
        train(model)
    assert len(caught) == 1


SILENT = {
    "allocated": lambda model: initialize_lora_fim_ranks(model),
    "unloaded": lambda model: model.unload(),
    "calibration goes on": lambda model: run_own_loop(model),
}


@pytest.mark.parametrize("case", SILENT)
def test_no_warning(case):
    model = fim_model()
    optimizer = adamw(model)
    other = torch.nn.Linear(2, 2)
    run_own_loop(model)
    SILENT[case](model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adamw(other).step()  # an optimizer of something else
        if case == "allocated":
            train(model, optimizer)


def test_a_model_that_is_gone_is_not_kept():
    before = len(forgotten._forgotten)
    model = fim_model()
    assert len(forgotten._forgotten) == before + 1
    del model
    gc.collect()
    assert len(forgotten._forgotten) <= before


def test_saving_before_the_allocation_warns(tmp_path):
    model = fim_model()
    with pytest.warns(FimLoraWarning, match=SAVED) as caught:
        model.save_pretrained(tmp_path)
    assert [warning.category for warning in caught].count(FimLoraWarning) == 1
    assert PeftModel.from_pretrained(llama(), tmp_path).peft_config["default"].r == 8
    run_own_loop(model)
    initialize_lora_fim_ranks(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FimLoraWarning)
        model.save_pretrained(tmp_path)


SOURCES = {
    "own loop": {},
    "dataloader": {"dataloader": lm_batches(), "show_progress_bar": False},
    "given scores": {"fim_scores": dict.fromkeys(lora_layers(fim_model()), 1.0)},
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_trained_adapter_keeps_its_weights_unless_they_are_discarded(source):
    model = fim_model()
    run_own_loop(model)
    with pytest.warns(FimLoraWarning, match=TRAINED):
        train(model, steps=1)
    output, before = logits(model), state_of(model)
    with pytest.raises(ValueError, match=r"'default' was trained.* 6 of 6 layers.*discard_weights=True"):
        initialize_lora_fim_ranks(model, **SOURCES[source])
    assert state_of(model) == before
    assert torch.equal(logits(model), output)
    initialize_lora_fim_ranks(model, **SOURCES[source], discard_weights=True)
    torch.testing.assert_close(logits(model), logits(llama()), rtol=1e-5, atol=1e-5)


def test_one_trained_layer_is_named():
    model = fim_model()
    run_own_loop(model)
    name, layer = list(lora_layers(model).items())[3]
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    with pytest.raises(ValueError, match=rf"1 of 6 layers is zero, such as of '{name}'"):
        initialize_lora_fim_ranks(model)


def test_loaded_weights_are_trained_weights(tmp_path):
    plain = get_peft_model(llama(), LoraConfig(r=8, target_modules=["q_proj"]))
    randomize(plain)
    plain.save_pretrained(tmp_path)
    config = fim_lora_config(target_modules=("q_proj",))
    model = PeftModel.from_pretrained(llama(), tmp_path, config=config, is_trainable=True)
    with pytest.raises(ValueError, match="its weights were loaded"):
        initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)


def test_an_embedding_whose_zero_weight_is_a_counts_as_untrained():
    config = fim_lora_config(target_modules=("embed_tokens", "q_proj"))
    model = get_peft_model(llama(), config)
    run_own_loop(model)
    layer = lora_layers(model)["model.embed_tokens"]
    assert layer.lora_embedding_B["default"].any()
    assert not layer.lora_embedding_A["default"].any()
    assert initialize_lora_fim_ranks(model).ranks
