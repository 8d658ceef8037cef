"""`get_fim_scores` on a model that already has an adapter, and on layers that only the adapted model has."""

import pytest
from peft import LoraConfig, get_peft_model

from fim_lora import get_fim_scores, initialize_lora_fim_ranks
from helpers.adapters import fim_lora_config, fim_model
from helpers.tiny_models import llama, lm_batches


def test_scores_of_a_plain_lora_adapter():
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    scores = get_fim_scores(model, lm_batches(8), show_progress_bar=False)
    assert scores.num_batches == 8
    expected = get_fim_scores(llama(), lm_batches(8), LoraConfig(target_modules=["q_proj"]), show_progress_bar=False)
    assert scores == expected


def test_replicated_layers_are_scored_in_the_adapted_model():
    options = {"layer_replication": [(0, 2), (1, 2)], "target_modules": ("q_proj",)}
    base = llama()
    with pytest.raises(ValueError, match="With layer_replication"):
        get_fim_scores(base, lm_batches(), fim_lora_config(**options))
    assert base.config.num_hidden_layers == 2
    allocation = initialize_lora_fim_ranks(fim_model(base, **options), lm_batches(), show_progress_bar=False)
    assert len(allocation.ranks) == 3
