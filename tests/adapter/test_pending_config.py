"""A config that awaits its ranks: PEFT treats and writes it as plain LoRA."""

import json

import pytest
from peft import EvaConfig, LoraConfig, get_peft_model

from fim_lora import FimConfig
from helpers.tiny_models import llama


def test_checks_of_peft_see_plain_lora():
    config = LoraConfig(init_lora_weights="fim", lora_bias=True)
    assert config.init_lora_weights == "fim"
    with pytest.warns(UserWarning, match="`eva_config` specified but will be ignored"):
        LoraConfig(init_lora_weights="fim", eva_config=EvaConfig())


def test_a_waiting_config_is_written_as_plain_lora(tmp_path):
    config = LoraConfig(r=4, init_lora_weights="fim", target_modules=["q_proj"])
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["init_lora_weights"] is True
    assert "fim_config" not in written
    assert config.init_lora_weights == "fim"


def test_a_waiting_adapter_starts_as_plain_lora_of_rank_r():
    model = get_peft_model(llama(), LoraConfig(r=4, init_lora_weights="fim", target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.r["default"] == 4
    assert layer.lora_B["default"].weight.count_nonzero() == 0
    assert layer.lora_A["default"].weight.count_nonzero() > 0


# With EVA, B would have a random bias.
@pytest.mark.parametrize("init", ["pissa", "eva"])
def test_peft_refuses_at_once_what_does_not_go_together(init):
    with pytest.raises(ValueError, match="lora_bias=True is only supported with init_lora_weights=True or False"):
        LoraConfig(init_lora_weights="fim", fim_config=FimConfig(init_lora_weights=init), lora_bias=True)
