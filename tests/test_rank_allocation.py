import json
import math
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file
from torch import nn

from fim_lora import FimConfig, FimScores, InvalidFileError, LayerScore, RankAllocation
from fim_lora.rank_allocation import verify_patterns
from tiny_models import llama, token_batch

SHAPES = {"q_proj": (64, 64), "v_proj": (32, 64)}
SCORES = FimScores(
    {
        f"model.layers.{depth}.self_attn.{kind}": LayerScore(10.0**-depth * (1 + place), 0.01, 16, shape)
        for depth in range(3)
        for place, (kind, shape) in enumerate(SHAPES.items())
    },
    num_batches=4,
    num_skipped_batches=1,
)


def config(**options):
    return LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights="fim", **options)


def allocation(**options):
    return RankAllocation.from_scores(SCORES, config(**options))


def test_patterns_hold_what_differs():
    result = allocation()
    assert sum(result.ranks.values()) == 48 == result.budget == result.budget_used
    assert result.rank_pattern == {name: rank for name, rank in result.ranks.items() if rank != 8}
    assert result.alpha_pattern == {name: 2 * rank for name, rank in result.ranks.items() if rank != 8}
    assert all(isinstance(alpha, int) for alpha in result.alpha_pattern.values())
    assert allocation(fim_config=FimConfig(adjust_scaling_factors=False)).alpha_pattern == {}


def test_counts_and_parameter_budget():
    result = allocation(fim_config=FimConfig(budget="parameters"))
    assert (result.num_batches, result.num_examples) == (4, 16)
    assert result.budget == 8 * 3 * (128 + 96)
    cost = {"q": 128, "v": 96}
    expected = sum(rank * cost[name.split(".")[-1][0]] for name, rank in result.ranks.items())
    assert result.num_parameters == result.budget_used == expected <= result.budget


def test_costs_and_steps_of_the_scores_are_kept():
    scores = FimScores({"a": LayerScore(3.0, None, 1, (64, 64), 10, 4), "b": LayerScore(1.0, None, 1, (64, 64), 1)})
    by_rank = RankAllocation.from_scores(scores, config())
    # λ = 16 / 4: a has exactly 12.
    assert (by_rank.ranks, by_rank.budget, by_rank.budget_used) == ({"a": 12, "b": 4}, 16, 16)
    assert by_rank.num_parameters == 124
    by_parameters = RankAllocation.from_scores(scores, config(fim_config=FimConfig(budget="parameters")))
    # λ = 88 / 31: a would have 8.5 and gets 8; b has the 8 parameters that are left.
    assert by_parameters.ranks == {"a": 8, "b": 8}
    assert by_parameters.budget == by_parameters.budget_used == by_parameters.num_parameters == 88


def test_layers_that_lose_their_adapter():
    result = allocation(fim_config=FimConfig(r_min=0))
    # By hand: λ = 48 / 3.33; the first layer of depth 0 has 14.4, the last one of depth 2 has 0.29.
    dropped = [f"model.layers.2.self_attn.{kind}" for kind in SHAPES]
    assert result.dropped_layers == dropped
    assert all(result.alphas[name] == 16 for name in dropped)
    kept = {name: rank for name, rank in result.ranks.items() if rank > 0}
    assert sum(kept.values()) == 48 == result.budget_used
    assert result.rank_pattern == kept
    assert result.alpha_pattern == {name: 2 * rank for name, rank in kept.items()}
    plain = result.to_lora_config(config())
    verify_patterns(plain, result)
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


def ranks_in(model):
    """Name in the base model to rank, of what PEFT really adapted."""
    ranks = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            name = name.removeprefix("base_model.model.")
            if isinstance(module, ParamWrapper):  # one inside the other where a module has several parameters
                name = f"{name.replace('.base_layer', '')}.{module.parameter_name}"
            ranks[name] = module.r["default"]
    return ranks


def scores_of(names, seed=0):
    """Scores over many orders of magnitude, so that some layers lose their adapter."""
    generator = torch.Generator().manual_seed(seed)
    values = 10 ** (-4 * torch.rand(len(names), generator=generator))
    return FimScores(
        {name: LayerScore(value.item(), None, 1, (24, 24)) for name, value in zip(names, values, strict=True)}
    )


def allocate_and_adapt(make_model, base, tmp_path):
    """Ranks that were meant, and those that PEFT made of the config, as it is and written to a file."""
    names = ranks_in(get_peft_model(make_model(), replace(base, init_lora_weights=True, fim_config=None)))
    result = RankAllocation.from_scores(scores_of(names), base)
    kept = {name: rank for name, rank in result.ranks.items() if rank > 0}
    assert 0 < len(kept) < len(names)
    plain = result.to_lora_config(base)
    verify_patterns(plain, result)
    plain.save_pretrained(tmp_path)
    assert ranks_in(get_peft_model(make_model(), LoraConfig.from_pretrained(tmp_path))) == kept
    model = get_peft_model(make_model(), plain)
    assert ranks_in(model) == kept
    # Again, from the config of the adapter itself.
    again = result.to_lora_config(model.peft_config["default"])
    assert ranks_in(get_peft_model(make_model(), again)) == kept
    return plain, kept


def fim_config(**options):
    options = {"r": 3, "lora_alpha": 6, "init_lora_weights": "fim", "fim_config": FimConfig(r_min=0)} | options
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
        # An entry that is a whole name does not care for layers_to_transform.
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
    base = fim_config(target_modules=["head", "proj"], fim_config=FimConfig(adjust_scaling_factors=False))
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
        # What loses nothing stays as it was written.
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
    model, result = trained_adapter(tmp_path, use_rslora=use_rslora, fim_config=FimConfig(r_min=r_min))
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
    model, result = trained_adapter(tmp_path, use_rslora=use_rslora, fim_config=FimConfig(r_min=r_min))
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert loaded.peft_config["default"].r == max(result.ranks.values()) > result.r
    verify_patterns(loaded.peft_config["default"], result)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(model), logits(llama().eval()), atol=0.1)


@pytest.mark.parametrize(
    ("options", "kind", "scaling"),
    [
        ({"fim_config": FimConfig(adjust_scaling_factors=False)}, "q_proj", "1.14286"),
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
    base = fim_config(target_modules=["head", "proj"], fim_config=FimConfig(adjust_scaling_factors=False))
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
    verify_patterns(plain, result)
    plain.rank_pattern = {"q_proj": 3} | plain.rank_pattern
    with pytest.raises(RuntimeError, match=r"give layer 'model\.layers\.0\.self_attn\.q_proj' the value 3"):
        verify_patterns(plain, result)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"fim_config": FimConfig(r_max=20, r_min=2)}, {"fim_config": FimConfig(r_min=0)}],
)
def test_save_and_load(tmp_path, options):
    result = allocation(**options)
    path = tmp_path / "fim_allocation.json"
    result.save(path, seed=3)
    assert RankAllocation.load(path) == result
    content = json.loads(path.read_text())
    assert (content["format"], content["schema_version"]) == ("fim_allocation", 1)
    assert content["provenance"] == {"seed": 3}
    assert [entry.name for entry in tmp_path.iterdir()] == ["fim_allocation.json"]
    # As private as the user's other files, not as private as a temporary one.
    other = tmp_path / "other"
    other.write_text("")
    assert path.stat().st_mode == other.stat().st_mode


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "reads up to 1: upgrade fim-lora"),
        ({"schema_version": "1"}, "no valid schema_version, but '1'"),
        ({"format": "fim_scores"}, "is not a fim_allocation file"),
        ({"ranks": None}, "is damaged"),
        ({"ranks": {}}, "is damaged.*different layers"),
        ({"fim_config": {"r_min": -1}}, "is damaged.*r_min must be at least 0"),
        ({"ranks": dict.fromkeys(SCORES, -1)}, "is damaged.*-1 is not between 0 and"),
        ({"fim_config": {"unknown": 0}}, "is damaged.*unknown"),
        ({"alphas": {"a": 1e999}}, "is not a JSON file: Infinity"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, change, message):
    path = tmp_path / "fim_allocation.json"
    allocation().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InvalidFileError, match=message):
        RankAllocation.load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\udcff"])
def test_files_that_are_no_json_of_ours(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InvalidFileError, match=r"broken\.json is not"):
        RankAllocation.load(path)


def test_printing_shows_a_compact_table():
    # By hand: the last two layers are at r_min=1, λ = 46 / 3.3 for the others, three ranks go by remainder.
    assert str(allocation()) == (
        "6 layers, budget 48 of 48 ranks, 16 examples in 4 batches\n"
        "\n"
        "model.layers\n"
        "   q_proj  v_proj\n"
        "0      14      28\n"
        "1       1       3\n"
        "2       1       1"
    )
