"""The `LoraConfig` of an allocation: what PEFT builds from it, with dropped layers and for servers."""

import json
import math
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

from fim_lora import FimScores, LayerScore, RankAllocation
from fim_lora.adapter.config_writer import verify_patterns
from helpers.adapters import ranks_in
from helpers.proportional import proportional
from helpers.rank_allocations import SCORES, SHAPES, allocation, config
from helpers.tiny_models import llama, token_batch


def test_layers_that_lose_their_adapter():
    result = allocation(fim_config=proportional(r_min=0))
    # By hand: λ = 48 / 3.33; the first layer of depth 0 has 14.4, the last one of depth 2 has 0.29.
    dropped = [f"model.layers.2.self_attn.{kind}" for kind in SHAPES]
    assert result.dropped_layers == dropped
    assert all(result.alphas[name] == 16 for name in dropped)
    kept = {name: rank for name, rank in result.ranks.items() if rank > 0}
    assert sum(kept.values()) == 48 == result.budget_used
    assert result.rank_pattern == kept
    assert result.alpha_pattern == {name: 2 * rank for name, rank in kept.items()}
    plain = result.to_lora_config(config())
    verify_patterns(plain, result.ranks, result.alphas)
    assert plain.target_modules == set(kept)
    assert str(result).splitlines()[-1].split() == ["2", "0", "0"]
    assert result.num_parameters == sum(rank * sum(SCORES[name].shape) for name, rank in kept.items())
    assert allocation().dropped_layers == []


def test_an_allocation_without_any_adapter_is_refused():
    result = allocation()
    empty = replace(result, ranks=dict.fromkeys(result.ranks, 0))
    for serving in (False, True):
        with pytest.raises(ValueError, match="No layer keeps an adapter"):
            empty.to_lora_config(config(), serving=serving)


def scores_of(names, seed=0):
    """Scores over many orders of magnitude, so that some layers lose their adapter."""
    generator = torch.Generator().manual_seed(seed)
    values = 10 ** (-4 * torch.rand(len(names), generator=generator))
    return FimScores(
        {name: LayerScore(value.item(), None, 1, (24, 24)) for name, value in zip(names, values, strict=True)}
    )


def allocate_and_adapt(make_model, base, tmp_path):
    """Compares the allocated ranks with those that PEFT builds from the config, directly and through a file."""
    names = ranks_in(get_peft_model(make_model(), replace(base, init_lora_weights=True, fim_config=None)))
    result = RankAllocation.from_scores(scores_of(names), base)
    kept = {name: rank for name, rank in result.ranks.items() if rank > 0}
    assert 0 < len(kept) < len(names)
    plain = result.to_lora_config(base)
    verify_patterns(plain, result.ranks, result.alphas)
    plain.save_pretrained(tmp_path)
    assert ranks_in(get_peft_model(make_model(), LoraConfig.from_pretrained(tmp_path))) == kept
    model = get_peft_model(make_model(), plain)
    assert ranks_in(model) == kept
    # The same from the config of the adapter itself.
    again = result.to_lora_config(model.peft_config["default"])
    assert ranks_in(get_peft_model(make_model(), again)) == kept
    return plain, kept


def fim_config(**options):
    options = {"r": 3, "lora_alpha": 6, "init_lora_weights": "fim", "fim_config": proportional(r_min=0)} | options
    return LoraConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"target_modules": ["q_proj", "v_proj", "o_proj"], "exclude_modules": ["layers.1.self_attn.v_proj"]},
        {"target_modules": ["model.layers.0.self_attn.q_proj", "lm_head", "down_proj"]},
    ],
)
def test_targets_are_the_names_of_the_layers_that_keep_an_adapter(tmp_path, options):
    plain, kept = allocate_and_adapt(lambda: llama(layers=5), fim_config(**options), tmp_path)
    if not isinstance(options["target_modules"], str) and len(kept) < 20:  # PEFT shortens longer lists
        assert sorted(plain.target_modules) == sorted(kept)
    assert plain.target_parameters is None


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2, 4]},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 2], "layers_pattern": "layers"},
        # PEFT ignores layers_to_transform for an entry that is a whole name.
        {"target_modules": ["model.layers.0.mlp.up_proj", "q_proj", "k_proj"], "layers_to_transform": [3]},
        {"target_modules": r".*\.[0-3]\.self_attn\.[qv]_proj"},
    ],
)
def test_targets_by_number_or_expression(tmp_path, options):
    plain, kept = allocate_and_adapt(lambda: llama(layers=5), fim_config(**options), tmp_path)
    assert isinstance(plain.target_modules, str)
    assert plain.layers_to_transform is plain.layers_pattern is None
    assert all(name.replace(".", "\\.") in plain.target_modules for name in kept)


class Towers(nn.Module):
    """Names of layers that are the ends of names of other layers."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(24, 24)
        self.body = nn.ModuleDict({"head": nn.Linear(24, 24), "proj": nn.Linear(24, 24)})
        self.teacher = nn.ModuleDict({"body": nn.ModuleDict({"proj": nn.Linear(24, 24)})})


def towers_allocation(ranks, base):
    scores = FimScores({name: LayerScore(1.0, None, 1, (24, 24)) for name in ranks})
    return replace(RankAllocation.from_scores(scores, base), ranks=ranks)


@pytest.mark.parametrize("serving", [False, True])
def test_a_kept_name_that_ends_the_name_of_a_dropped_layer(serving):
    base = fim_config(target_modules=["head", "proj"], fim_config=proportional(adjust_scaling_factors=False))
    ranks = {"head": 3, "body.head": 0, "body.proj": 3, "teacher.body.proj": 0}
    plain = towers_allocation(ranks, base).to_lora_config(base, serving=serving)
    assert plain.target_modules == r"(?:head|body\.proj)"
    assert ranks_in(get_peft_model(Towers(), plain)) == {"head": 3, "body.proj": 3}


def test_a_module_that_an_expression_left_out_stays_without_an_adapter():
    base = fim_config(target_modules=r"(body\.)?head|body\.proj")
    ranks = {"head": 0, "body.head": 2, "body.proj": 4}
    plain = towers_allocation(ranks, base).to_lora_config(base)
    assert ranks_in(get_peft_model(Towers(), plain)) == {"body.head": 2, "body.proj": 4}


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 24, 24))
        self.down = nn.Parameter(torch.randn(3, 24, 24))


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(24, 24), "experts": Experts()}) for _ in range(4))


@pytest.mark.parametrize("target_modules", [["proj"], r"layers\.\d\.proj", []])
@pytest.mark.parametrize("target_parameters", [["experts.up", "experts.down"], ["layers.0.experts.up", "down"]])
def test_parameters_that_lose_their_adapter(tmp_path, target_modules, target_parameters):
    base = fim_config(target_modules=target_modules, target_parameters=target_parameters)
    plain, kept = allocate_and_adapt(Mixture, base, tmp_path)
    assert plain.target_parameters == [name for name in kept if "experts" in name]
    if not target_modules:
        assert plain.target_modules == set()


@pytest.mark.parametrize(
    ("dropped", "modules", "parameters"),
    [
        # A list that loses no layer stays as it was written.
        (["layers.1.experts.up"], {"proj"}, ["layers.0.experts.up"]),
        (["layers.1.proj"], {"layers.0.proj"}, ["experts.up"]),
        (["layers.0.proj", "layers.1.proj"], set(), ["experts.up"]),
        (["layers.0.experts.up", "layers.1.experts.up"], {"proj"}, []),
    ],
)
def test_modules_and_parameters_are_dropped_separately(dropped, modules, parameters):
    class Pair(Mixture):
        def __init__(self):
            super().__init__()
            del self.layers[2:]

    base = fim_config(target_modules=["proj"], target_parameters=["experts.up"])
    names = [f"layers.{depth}.{kind}" for depth in range(2) for kind in ("proj", "experts.up")]
    ranks = {name: 0 if name in dropped else 2 for name in names}
    plain = towers_allocation(ranks, base).to_lora_config(base)
    assert (plain.target_modules, plain.target_parameters) == (modules, parameters)
    assert ranks_in(get_peft_model(Pair(), plain)) == {name: 2 for name in names if name not in dropped}


def test_parameters_that_cannot_be_told_apart():
    base = fim_config(target_modules=[], target_parameters=["experts.up"])
    result = towers_allocation({"experts.up": 3, "teacher.experts.up": 0}, base)
    with pytest.raises(ValueError, match=r"'teacher\.experts\.up' should lose its adapter.*set r_min=1"):
        result.to_lora_config(base)


def trained_adapter(folder, **options):
    """An adapter with random weights, saved by PEFT; its config is then written for servers."""
    base = fim_config(target_modules="all-linear", task_type="CAUSAL_LM", **options)
    names = [name for name, module in llama().named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    result = RankAllocation.from_scores(scores_of(names), base)
    torch.manual_seed(1)
    model = get_peft_model(llama(), result.to_lora_config(base)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    result.to_lora_config(model.peft_config["default"], serving=True).save_pretrained(folder)
    return model, result


def logits(model):
    with torch.no_grad():
        return model(**token_batch()).logits


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("r_min", [0, 1])
def test_a_server_that_reads_only_global_numbers_gets_the_same_updates(tmp_path, use_rslora, r_min):
    model, result = trained_adapter(tmp_path, use_rslora=use_rslora, fim_config=proportional(r_min=r_min))
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    r, lora_alpha = content["r"], content["lora_alpha"]
    scaling = lora_alpha / math.sqrt(r) if content["use_rslora"] else lora_alpha / r
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    updates = {}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
            assert a.shape[0] <= r
            updates[key.removesuffix(".lora_A.weight")] = scaling * (b @ a)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert len({layer.r["default"] for layer in layers.values()}) > 3
    assert updates.keys() == layers.keys()
    assert len(updates) == len(result.ranks) - len(result.dropped_layers)
    for name, layer in layers.items():
        torch.testing.assert_close(updates[name], layer.get_delta_weight("default"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("r_min", [0, 1])
def test_peft_loads_the_config_for_servers_as_the_same_adapter(tmp_path, use_rslora, r_min):
    model, result = trained_adapter(tmp_path, use_rslora=use_rslora, fim_config=proportional(r_min=r_min))
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert loaded.peft_config["default"].r == max(result.ranks.values()) > result.r
    verify_patterns(loaded.peft_config["default"], result.ranks, result.alphas)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(model), logits(llama().eval()), atol=0.1)


@pytest.mark.parametrize(
    ("options", "kind", "scaling"),
    [
        ({"fim_config": proportional(adjust_scaling_factors=False)}, "q_proj", "1.14286"),
        ({"alpha_pattern": {"layers.2.self_attn.v_proj": 32}}, "v_proj", "4"),
        ({"rank_pattern": {"layers.2.self_attn.v_proj": 4}}, "v_proj", "4"),
    ],
)
def test_layers_without_a_shared_scaling_cannot_be_served(options, kind, scaling):
    result = allocation(**options)
    result.to_lora_config(config(**options))
    message = (
        rf"Layer 'model.*v_proj' has scaling .*, layer 'model.*{kind}' has {scaling}, .*adjust_scaling_factors=True"
    )
    with pytest.raises(ValueError, match=message):
        result.to_lora_config(config(**options), serving=True)


def test_serving_a_uniform_allocation_changes_nothing():
    base = fim_config(target_modules=["head", "proj"], fim_config=proportional(adjust_scaling_factors=False))
    plain = towers_allocation({"head": 3, "body.proj": 3}, base).to_lora_config(base, serving=True)
    assert (plain.r, plain.lora_alpha, plain.rank_pattern, plain.alpha_pattern) == (3, 6, {}, {})


def test_to_lora_config():
    base = config()
    plain = allocation().to_lora_config(base)
    assert base.init_lora_weights == "fim"
    assert plain.init_lora_weights is True
    assert plain.fim_config is None
    assert plain.rank_pattern == allocation().rank_pattern
    assert (plain.r, plain.lora_alpha, plain.target_modules) == (8, 16, {"q_proj", "v_proj"})
    for field, value in {"r": 4, "lora_alpha": 8, "use_rslora": True}.items():
        with pytest.raises(ValueError, match=f"base_config has {field}={value}"):
            allocation().to_lora_config(replace(base, **{field: value}))


def test_patterns_that_resolve_otherwise_are_refused():
    result = allocation()
    plain = result.to_lora_config(config())
    verify_patterns(plain, result.ranks, result.alphas)
    plain.rank_pattern = {"q_proj": 3} | plain.rank_pattern
    with pytest.raises(RuntimeError, match=r"give layer 'model\.layers\.0\.self_attn\.q_proj' the value 3"):
        verify_patterns(plain, result.ranks, result.alphas)
