"""Adapters of fim_lora in stock PEFT: another process, where fim_lora is never imported and a warning is an error."""

import pytest
import torch
from peft import get_peft_model

from fim_lora import RankAllocation, get_fim_scores, initialize_lora_fim_ranks
from helpers.adapters import fim_lora_config, fim_model, logits, randomize
from helpers.stock_peft import require_equal_outputs, stock
from helpers.tiny_models import llama, lm_batches, token_batch


@pytest.mark.filterwarnings("ignore:This adapter never got its FIM ranks")
@pytest.mark.parametrize("allocated", [True, False])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "adjust_scaling_factors": False}, {"use_dora": True}])
def test_a_saved_adapter_gives_equal_outputs(tmp_path, allocated, options):
    model = fim_model(lora_alpha=5, task_type="CAUSAL_LM", **options)
    if allocated:
        initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)
    randomize(model)
    require_equal_outputs(model, logits(model), tmp_path, 1e-5)


def test_to_lora_config_gives_the_ranks_to_any_trainer(tmp_path):
    config = fim_lora_config(lora_alpha=5)
    scores = get_fim_scores(llama(), lm_batches(), config, show_progress_bar=False)
    allocation = RankAllocation.from_scores(scores, config)
    plain = allocation.to_lora_config(config)
    assert config.init_lora_weights == "fim"
    plain.save_pretrained(tmp_path)
    ranks = {f"base_model.model.{name}": rank for name, rank in allocation.ranks.items()}
    stock(f"""
        model = get_peft_model(base, LoraConfig.from_pretrained({str(tmp_path)!r}))
        for name, rank in {ranks!r}.items():
            layer = model.get_submodule(name)
            assert layer.r["default"] == rank
            assert abs(layer.scaling["default"] - 5 / 8) < 1e-9
    """)
    model = get_peft_model(llama(), plain)
    assert torch.equal(logits(model), logits(llama()))
    model(**token_batch()).loss.backward()
