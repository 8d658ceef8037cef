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


@pytest.mark.filterwarnings("ignore:This adapter never got its FIM ranks")
def test_a_waiting_config_is_written_as_plain_lora(tmp_path):
    config = LoraConfig(r=4, init_lora_weights="fim", target_modules=["q_proj"])
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["init_lora_weights"] is True
    assert "fim_config" not in written
    assert config.init_lora_weights == "fim"
    get_peft_model(llama(), config).save_pretrained(tmp_path / "model")
    of_model = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
    assert (of_model["init_lora_weights"], "fim_config" in of_model) == (True, False)


@pytest.mark.filterwarnings("ignore:This adapter never got its FIM ranks")
def test_a_config_that_awaits_directions_of_eva_is_written_without_eva(tmp_path):
    fim = FimConfig(init_lora_weights="eva")
    config = LoraConfig(init_lora_weights="fim", fim_config=fim, eva_config=EvaConfig(), target_modules=["q_proj"])
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["eva_config"] is None
    assert config.eva_config == EvaConfig()


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


@pytest.mark.parametrize(
    "fim", [None, FimConfig(r_max=12, init_lora_weights="gaussian"), FimConfig(init_lora_weights="eva")]
)
def test_a_config_made_from_the_values_of_another_is_the_same(fim):
    config = LoraConfig(r=4, init_lora_weights="fim", fim_config=fim, target_modules=["q_proj"])
    assert LoraConfig(**config.to_dict()) == config
    assert LoraConfig.from_peft_type(**json.loads(json.dumps(config.to_dict(), default=list))) == config


def test_values_of_other_configs_have_no_field_that_peft_does_not_have():
    assert "fim_config" not in LoraConfig(r=4).to_dict()
