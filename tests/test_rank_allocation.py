import json
from dataclasses import replace

import pytest
from peft import LoraConfig

from fim_lora import FimConfig, FimScores, InvalidFileError, LayerScore, RankAllocation
from fim_lora.rank_allocation import verify_patterns

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


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"fim_config": FimConfig(r_max=20, r_min=2)}])
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
        ({"fim_config": {"r_min": 0}}, "is damaged.*r_min must be at least 1"),
        ({"fim_config": {"unknown": 0}}, "is damaged.*unknown"),
        ({"alphas": {"a": 1e999}}, "is damaged"),
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
        "6 layers, budget 48 of 48 ranks, 4 batches, 16 examples\n"
        "\n"
        "model.layers\n"
        "   q_proj  v_proj\n"
        "0      14      28\n"
        "1       1       3\n"
        "2       1       1"
    )
