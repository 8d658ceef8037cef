"""The folder of an allocation, given to PEFT as if it were a trained adapter."""

import subprocess
import sys

import pytest
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from helpers.rank_allocations import allocation, config


def new_model():
    projections = [{"q_proj": nn.Linear(64, 64), "v_proj": nn.Linear(64, 32)} for _ in range(3)]
    layers = [nn.ModuleDict({"self_attn": nn.ModuleDict(one)}) for one in projections]
    return nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList(layers)})})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    path = tmp_path / "adapter"
    allocation().to_lora_config(config()).save_pretrained(path)
    allocation().save(path / "fim_allocation.json")
    return path


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_from_pretrained_says_what_to_do_and_changes_nothing(folder, kind):
    model = new_model()
    before = [name for name, _ in model.named_modules()]
    for load in (
        lambda: PeftModel.from_pretrained(model, kind(folder)),
        lambda: PeftModel.from_pretrained(model, model_id=kind(folder), adapter_name="x"),
        lambda: PeftModel.from_pretrained(model, str(folder.parent), subfolder="adapter"),
    ):
        with pytest.raises(ValueError, match="but no weights") as raised:
            load()
        assert f"get_peft_model(model, LoraConfig.from_pretrained({str(folder)!r}))" in str(raised.value)
        assert [name for name, _ in model.named_modules()] == before


def test_load_adapter_leaves_the_other_adapter_alone(folder):
    model = get_peft_model(new_model(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="but no weights"):
        model.load_adapter(str(folder), "second")
    assert list(model.peft_config) == ["default"]


def test_the_advice_works_and_its_result_loads(folder):
    get_peft_model(new_model(), LoraConfig.from_pretrained(str(folder))).save_pretrained(folder)
    loaded = PeftModel.from_pretrained(new_model(), folder)
    loaded.load_adapter(str(folder), adapter_name="second")
    assert list(loaded.peft_config) == ["default", "second"]


def test_other_folders_without_weights_are_left_to_peft(folder):
    (folder / "fim_allocation.json").unlink()
    with pytest.raises(Exception) as raised:  # noqa: PT011  the type depends on the version of PEFT
        PeftModel.from_pretrained(new_model(), str(folder))
    assert "fim-lora" not in str(raised.value)


def test_installing_again_wraps_nothing_again():
    code = (
        "import fim_lora, peft; before = peft.PeftModel.load_adapter, peft.PeftModel.__dict__['from_pretrained']\n"
        "from fim_lora.adapter.install import install; install({})\n"
        "assert before == (peft.PeftModel.load_adapter, peft.PeftModel.__dict__['from_pretrained'])"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
