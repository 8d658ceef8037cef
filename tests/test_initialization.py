"""`initialize_lora_fim_ranks` on real PEFT models: the three sources of scores, and the adapter afterwards."""

import copy
import inspect

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.state import GradientState
from peft import PeftModel, get_eva_state_dict, get_peft_model, initialize_lora_eva_weights, inject_adapter_in_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import BatchEncoding
from transformers.pytorch_utils import Conv1D

from fim_lora import get_fim_scores, initialize_lora_fim_ranks
from fim_lora.runtime import progress
from helpers.adapters import fim_lora_config, fim_model, logits, lora_layers, randomize, run_own_loop
from helpers.tiny_models import (
    bert,
    class_batch,
    eva_batches,
    gpt2,
    llama,
    lm_batches,
    names_of,
    per_example_scores,
    t5,
)

# --- The three sources of scores ---


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_own_loop_dataloader_and_given_scores_agree_with_autograd(task_type):
    options = {"task_type": task_type}
    batches = lm_batches()
    truth = per_example_scores(llama(), batches, names_of(llama(), "q_proj", "v_proj", "down_proj"))

    own_loop = fim_model(**options)
    run_own_loop(own_loop, batches)
    by_loop = initialize_lora_fim_ranks(own_loop)
    by_loader = initialize_lora_fim_ranks(fim_model(**options), batches, show_progress_bar=False)
    scores = get_fim_scores(llama(), batches, fim_lora_config(**options), show_progress_bar=False)
    by_scores = initialize_lora_fim_ranks(fim_model(**options), fim_scores=scores)

    for allocation in (by_loop, by_loader, by_scores):
        assert allocation.ranks == by_loop.ranks
        assert allocation.num_batches == 3
        assert allocation.num_examples == 12
        for name, values in truth.items():
            assert allocation.scores[name].mean == pytest.approx(values.mean().item(), rel=1e-5)
    assert sum(by_loop.ranks.values()) == by_loop.budget == by_loop.budget_used == 8 * 6
    assert len(set(by_loop.ranks.values())) > 1


def test_given_scores_as_floats_tensors_and_with_prefix():
    names = list(lora_layers(fim_model()))
    floats = {name: float(index + 1) for index, name in enumerate(names)}
    diagonals = {f"base_model.model.{name}": torch.full((4, 3), value) for name, value in floats.items()}
    one = initialize_lora_fim_ranks(fim_model(), fim_scores=floats)
    other = initialize_lora_fim_ranks(fim_model(), fim_scores=diagonals)
    assert one.ranks == other.ranks
    assert [one.ranks[name] for name in names] == [2, 5, 7, 9, 11, 14]
    assert one.num_batches == 0
    assert one.scores[names[0]].standard_error is None


def test_progress_bar(capfd, monkeypatch):
    # Without a terminal, a line comes only now and then.
    monkeypatch.setattr(progress, "_SECONDS_PER_LINE", 0.0)
    initialize_lora_fim_ranks(fim_model(), lm_batches())
    assert "eFIM: 100%" in capfd.readouterr().err
    initialize_lora_fim_ranks(fim_model(), lm_batches(), show_progress_bar=False)
    assert "eFIM" not in capfd.readouterr().err


def test_forward_fn_decides_the_loss():
    seen = []

    def forward_fn(model, batch):
        seen.append(type(model))
        return 3 * model(**batch).loss

    plain = initialize_lora_fim_ranks(fim_model(), lm_batches(), show_progress_bar=False)
    tripled = initialize_lora_fim_ranks(fim_model(), lm_batches(), forward_fn=forward_fn, show_progress_bar=False)
    assert len(seen) == 3
    for name in plain.ranks:
        assert tripled.scores[name].mean == pytest.approx(9 * plain.scores[name].mean, rel=1e-5)
    assert tripled.ranks == plain.ranks


@pytest.mark.parametrize(("batches", "options"), [(lm_batches, {}), (eva_batches, {"init_lora_weights": "eva"})])
def test_accelerate_does_not_wait_for_the_rest_of_a_dataloader(batches, options):
    dataloader = prepare_data_loader(DataLoader(batches() * 4, batch_size=None), put_on_device=False)
    before = GradientState().dataloader_references  # other tests may have left some
    allocation = initialize_lora_fim_ranks(fim_model(**options), dataloader, show_progress_bar=False)
    assert allocation.scores.num_batches < len(dataloader)
    assert GradientState().dataloader_references == before
    # One that the caller is in the middle of stays so.
    for _ in dataloader:
        initialize_lora_fim_ranks(fim_model(), lm_batches(), show_progress_bar=False)
        assert GradientState().active_dataloader is dataloader
        break
    dataloader.end()


def test_arguments_come_in_the_order_of_those_of_eva():
    for ours, of_eva in (
        (get_fim_scores, get_eva_state_dict),
        (initialize_lora_fim_ranks, initialize_lora_eva_weights),
    ):
        names, names_of_eva = (list(inspect.signature(function).parameters) for function in (ours, of_eva))
        shared = [name for name in names_of_eva if name in names]
        assert [name for name in names if name in names_of_eva] == shared
        assert {"model", "dataloader", "forward_fn", "adapter_name", "show_progress_bar"} <= set(shared)


def test_trained_modules_to_save_are_part_of_the_loss():
    base = bert()
    model = get_peft_model(base, fim_lora_config(target_modules=("query",), task_type="SEQ_CLS"))
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.mul_(3)
    truth = bert()
    with torch.no_grad():
        truth.classifier.weight.mul_(3)
    batches = [class_batch(seed=seed) for seed in range(3)]
    expected = per_example_scores(truth, batches, names_of(truth, "query"))
    allocation = initialize_lora_fim_ranks(model, batches, show_progress_bar=False)
    for name, values in expected.items():
        assert allocation.scores[name].mean == pytest.approx(values.mean().item(), rel=1e-5)


def test_batches_of_tokenizers():
    batches = [BatchEncoding(batch) for batch in lm_batches()]
    by_encoding = initialize_lora_fim_ranks(fim_model(), batches, show_progress_bar=False)
    assert by_encoding.ranks == initialize_lora_fim_ranks(fim_model(), lm_batches(), show_progress_bar=False).ranks


# --- The adapter afterwards ---


def test_the_config_becomes_that_of_plain_lora():
    model = fim_model()
    config = model.peft_config["default"]
    allocation = initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)
    assert model.peft_config["default"] is config
    assert config.init_lora_weights is True
    assert config.fim_config is None
    assert config.rank_pattern == allocation.rank_pattern
    assert config.alpha_pattern == allocation.alpha_pattern
    assert config.r == 8


def test_other_architectures():
    cases = [
        (gpt2(), ("c_attn", "c_proj", "c_fc"), lm_batches()),
        (t5(), ("q", "v", "wo"), lm_batches()),
        (bert(), ("query", "dense"), [class_batch(seed=seed) for seed in range(3)]),
    ]
    for base, targets, batches in cases:
        fan_in_fan_out = any(isinstance(module, Conv1D) for module in base.modules())
        before = copy.deepcopy(base)
        model = fim_model(base, target_modules=targets, fan_in_fan_out=fan_in_fan_out)
        allocation = initialize_lora_fim_ranks(model, batches, show_progress_bar=False)
        assert sum(allocation.ranks.values()) == 8 * len(allocation.ranks)
        model.eval()
        before.eval()
        with torch.no_grad():
            torch.testing.assert_close(model(**batches[0]).loss, before(**batches[0]).loss, rtol=0, atol=0)


def test_injected_adapter_without_a_peft_model():
    base = llama()
    model = inject_adapter_in_model(fim_lora_config(), base)
    assert not isinstance(model, PeftModel)
    run_own_loop(model)
    by_loop = initialize_lora_fim_ranks(model)
    by_loader = initialize_lora_fim_ranks(fim_model(), lm_batches(), show_progress_bar=False)
    assert by_loop.ranks == by_loader.ranks
    assert {name: layer.r["default"] for name, layer in lora_layers(model).items()} == by_loop.ranks


def test_user_patterns_set_the_base_ranks_and_alphas():
    patterns = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.0.self_attn.q_proj": 16}}
    model = fim_model(**patterns, r_max=32)
    allocation = initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)
    assert allocation.budget == 2 * 4 + 4 * 8 == sum(allocation.ranks.values())
    layers = lora_layers(model)
    assert layers["model.layers.0.self_attn.q_proj"].scaling["default"] == pytest.approx(16 / 4)
    assert layers["model.layers.1.self_attn.q_proj"].scaling["default"] == pytest.approx(8 / 4)
    assert layers["model.layers.1.mlp.down_proj"].scaling["default"] == pytest.approx(1)


class Nested(nn.Module):
    """The name of one layer, `proj`, is the end of another name, `block.proj`. One name has a special character."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.ModuleDict({"proj": nn.Linear(8, 8), "a+b": nn.Linear(8, 8)})
        self.proj = nn.Linear(8, 8)
        self.blockxproj = nn.Linear(8, 8)

    def forward(self, x):
        return self.proj(torch.tanh(self.block["a+b"](self.block["proj"](x)) + self.blockxproj(x)))


@pytest.mark.parametrize(
    "ranks",
    [
        {"proj": 1, "block.proj": 4, "block.a+b": 6, "blockxproj": 5},  # the longer name has the global rank
        {"proj": 4, "block.proj": 1, "block.a+b": 6, "blockxproj": 5},
        {"block.proj": 3, "block.a+b": 1, "proj": 6, "blockxproj": 6},
    ],
)
def test_names_that_are_ends_of_other_names(ranks, tmp_path):
    model = get_peft_model(Nested(), fim_lora_config(r=4, target_modules=r".*(proj|b)", r_max=8))
    allocation = initialize_lora_fim_ranks(model, fim_scores={name: float(rank) for name, rank in ranks.items()})
    assert allocation.ranks == ranks
    meant = {name: layer.r["default"] for name, layer in lora_layers(model).items()}
    assert meant == allocation.ranks
    randomize(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Nested(), tmp_path)
    assert {name: layer.r["default"] for name, layer in lora_layers(loaded).items()} == meant
    x = torch.randn(2, 8)
    torch.testing.assert_close(loaded.eval()(x), model.eval()(x))


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("adjust", [True, False])
def test_save_and_load_keep_ranks_scalings_and_outputs(tmp_path, use_rslora, adjust):
    model = fim_model(use_rslora=use_rslora, adjust_scaling_factors=adjust, lora_alpha=5)
    initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)
    randomize(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    for (name, one), (_, other) in zip(lora_layers(model).items(), lora_layers(loaded).items(), strict=True):
        assert one.r == other.r, name
        assert one.scaling["default"] == pytest.approx(other.scaling["default"])
    torch.testing.assert_close(logits(loaded), logits(model))
