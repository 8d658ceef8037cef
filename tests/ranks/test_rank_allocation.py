"""`RankAllocation`: its numbers, its files and its table."""

import json

import pytest

from fim_lora import FimScores, InvalidFileError, LayerScore, RankAllocation
from helpers.proportional import proportional
from helpers.rank_allocations import SCORES, allocation, config


def test_patterns_hold_what_differs():
    result = allocation()
    assert sum(result.ranks.values()) == 48 == result.budget == result.budget_used
    assert result.rank_pattern == {name: rank for name, rank in result.ranks.items() if rank != 8}
    assert result.alpha_pattern == {name: 2 * rank for name, rank in result.ranks.items() if rank != 8}
    assert all(isinstance(alpha, int) for alpha in result.alpha_pattern.values())
    assert allocation(fim_config=proportional(adjust_scaling_factors=False)).alpha_pattern == {}


def test_counts_and_parameter_budget():
    result = allocation(fim_config=proportional(budget="parameters"))
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
    by_parameters = RankAllocation.from_scores(scores, config(fim_config=proportional(budget="parameters")))
    # λ = 88 / 31: a would have 8.5 and gets 8; b has the 8 parameters that are left.
    assert by_parameters.ranks == {"a": 8, "b": 8}
    assert by_parameters.budget == by_parameters.budget_used == by_parameters.num_parameters == 88


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"fim_config": proportional(r_max=20, r_min=2)}, {"fim_config": proportional(r_min=0)}],
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
    # The file has the permissions of the user's other files, and not those of a temporary file.
    other = tmp_path / "other"
    other.write_text("")
    assert path.stat().st_mode == other.stat().st_mode


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "reads up to 1: upgrade fim-lora"),
        ({"schema_version": "1"}, "schema_version '1', which is not a positive integer"),
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
