"""The Python examples of README and docs/compression.md about trained adapters run as they are written."""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import fim_lora
from helpers.tiny_models import llama, lm_batches

ROOT = Path(__file__).parent.parent


def examples():
    for name in ("README.md", "docs/compression.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL)):
            if "compress_lora" in block:
                yield pytest.param(block, id=f"{name}-{number}")


def trained_model():
    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(llama(), config)


@pytest.mark.parametrize("code", list(examples()))
def test_examples_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, dataloader = trained_model(), lm_batches()
    before = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    spectrum = fim_lora.get_lora_spectrum(model, dataloader, num_batches=2, show_progress_bar=False)
    names = {"fim_lora": fim_lora, "model": model, "dataloader": dataloader, "optimizer": optimizer}
    exec(code, names | {"spectrum": spectrum})
    after = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)
    assert after <= before
    if "keep=0.5" in code:
        assert after <= before / 2
        PeftModel.from_pretrained(llama(), str(tmp_path / "small"))


def test_there_are_examples():
    assert len(list(examples())) >= 3
