"""Models with fused modules, for which PEFT converts the targets of a config: every way gives the same adapter."""

import copy
import json
from dataclasses import replace

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from fim_lora import FimScores, InvalidFileError, RankAllocation, get_fim_scores, initialize_lora_fim_ranks
from fim_lora.adapter.config_writer import verify_patterns
from fim_lora.ranks.allocation import ALLOCATION_FILE
from helpers.adapters import lora_layers, ranks_in
from helpers.cli_inputs import VOCABULARY, allocate, texts, word_tokenizer, write_jsonl
from helpers.expert_models import COMMON, mixtral, olmoe, qwen3_moe
from helpers.proportional import proportional
from helpers.tiny_models import llama, lm_batches

MODELS = {
    "mixtral": (mixtral, ["w1", "w2", "w3"]),
    "qwen3_moe": (qwen3_moe, ["gate_proj", "up_proj", "down_proj"]),
    "olmoe": (olmoe, ["gate_proj", "up_proj", "down_proj"]),
}
R = 4


def targets_of(kind, experts):
    names = ["q_proj", *experts]
    return {
        "names": names,
        "names and router": [*names, "gate"],
        "expression": rf".*\.({'|'.join(names)})",
        "all-linear": "all-linear",
    }[kind]


CASES = [(model, kind) for model in MODELS for kind in ("names", "names and router", "expression", "all-linear")]


def fused_config(target_modules, **options):
    fim_config = proportional(
        fim_calibration_batches=3, **{key: options.pop(key) for key in ("r_min", "budget") if key in options}
    )
    return LoraConfig(
        r=R, lora_alpha=8, target_modules=target_modules, init_lora_weights="fim", fim_config=fim_config, **options
    )


def uniform_ranks(make, config):
    """Ranks by stock PEFT. The test is skipped if this PEFT or transformers does not convert targets."""
    plain = copy.deepcopy(config)
    plain.init_lora_weights, plain.fim_config = True, None
    try:
        ranks = ranks_in(get_peft_model(make(), plain))
    except ValueError:
        ranks = {}
    if not any(name.endswith("experts.gate_up_proj") for name in ranks):
        assert Version(peft.__version__) < Version("0.21"), "this PEFT converts the targets"
        pytest.skip("this PEFT does not convert the targets")
    return ranks


def scalings(model):
    return {name: layer.scaling["default"] for name, layer in lora_layers(model).items()}


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_two_steps_give_the_adapter_of_one(tmp_path, name, kind):
    make, experts = MODELS[name]
    config = fused_config(targets_of(kind, experts))
    uniform = uniform_ranks(make, config)
    before = copy.deepcopy(config)
    scores = get_fim_scores(make(), lm_batches(), config, show_progress_bar=False)
    assert config == before

    one_model = get_peft_model(make(), copy.deepcopy(config))
    one = initialize_lora_fim_ranks(one_model, lm_batches(), show_progress_bar=False)
    scores.save(tmp_path / "scores.json")
    for found in (scores, FimScores.load(tmp_path / "scores.json")):
        two = RankAllocation.from_scores(found, config)
        assert (two.ranks, two.alphas, two.budget) == (one.ranks, one.alphas, one.budget)
        assert one.budget == sum(uniform.values())
        lora_config = two.to_lora_config(config)
        verify_patterns(lora_config, two.ranks, two.alphas)
        lora_config.save_pretrained(tmp_path)
        for written in (lora_config, LoraConfig.from_pretrained(tmp_path)):
            model = get_peft_model(make(), written)
            assert ranks_in(model) == one.ranks
            assert scalings(model) == scalings(one_model)
            # The same from the config of the adapter.
            again = two.to_lora_config(model.peft_config["default"])
            assert ranks_in(get_peft_model(make(), again)) == one.ranks
    assert config == before
    given = initialize_lora_fim_ranks(get_peft_model(make(), copy.deepcopy(config)), fim_scores=scores)
    assert given.ranks == one.ranks
    # The allocation of the adapter gives these ranks for any config.
    one.save(tmp_path / "allocation.json")
    for allocation in (one, given, RankAllocation.load(tmp_path / "allocation.json")):
        assert ranks_in(get_peft_model(make(), allocation.to_lora_config(config))) == one.ranks
    waiting = get_peft_model(make(), copy.deepcopy(config))
    of_adapter = get_fim_scores(waiting, lm_batches(), show_progress_bar=False)
    assert RankAllocation.from_scores(of_adapter, config).ranks == one.ranks


@pytest.mark.parametrize("serving", [False, True])
@pytest.mark.parametrize("kind", ["names", "expression", "all-linear"])
def test_stock_peft_builds_a_layer_of_rank_r(kind, serving):
    config = fused_config(targets_of(kind, MODELS["mixtral"][1]))
    uniform_ranks(mixtral, config)
    scores = get_fim_scores(mixtral(), lm_batches(), config, show_progress_bar=False)
    ranks = dict.fromkeys(scores, R)
    alphas = dict.fromkeys(scores, config.lora_alpha)
    allocation = replace(RankAllocation.from_scores(scores, config), ranks=ranks, alphas=alphas)
    model = get_peft_model(mixtral(), allocation.to_lora_config(config, serving=serving))
    assert ranks_in(model) == allocation.ranks
    assert set(scalings(model).values()) == {2.0}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"rank_pattern": {"layers.1.mlp.experts.gate_up_proj": 5}}, [2 * R, 5]),
        ({"alpha_pattern": {"gate_up_proj": 3}}, [2 * R, 2 * R]),
    ],
)
def test_patterns_of_the_config_come_first_as_in_peft(patterns, expected):
    config = fused_config(["q_proj", "w1", "w2", "w3"], **patterns)
    uniform = uniform_ranks(mixtral, config)
    assert [rank for name, rank in uniform.items() if "gate_up_proj" in name] == expected
    scores = get_fim_scores(mixtral(), lm_batches(), config, show_progress_bar=False)
    two = RankAllocation.from_scores(scores, config)
    model = get_peft_model(mixtral(), copy.deepcopy(config))
    one = initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)
    assert (two.ranks, two.alphas, two.budget) == (one.ranks, one.alphas, sum(uniform.values()))


@pytest.mark.parametrize("kind", ["names", "names and router", "expression", "all-linear"])
def test_layers_that_lose_their_adapter(tmp_path, kind):
    config = fused_config(targets_of(kind, MODELS["mixtral"][1]), r_min=0)
    names = list(uniform_ranks(mixtral, config))
    measured = get_fim_scores(mixtral(), lm_batches(), config, show_progress_bar=False)
    dropped = {next(name for name in names if name.endswith(end)) for end in ("q_proj", "gate_up_proj")}
    dropped.add(next(name for name in reversed(names) if name.endswith("down_proj")))
    # A score of zero gives a rank of zero.
    scores = FimScores.from_dict(
        measured.to_dict()
        | {
            "layers": {
                name: layer | {"mean": 0.0 if name in dropped else 1.0}
                for name, layer in measured.to_dict()["layers"].items()
            }
        }
    )
    allocation = RankAllocation.from_scores(scores, config)
    assert set(allocation.dropped_layers) == dropped
    kept = {name: rank for name, rank in allocation.ranks.items() if rank}
    lora_config = allocation.to_lora_config(config)
    lora_config.save_pretrained(tmp_path)
    for written in (lora_config, LoraConfig.from_pretrained(tmp_path)):
        model = get_peft_model(mixtral(), written)
        assert ranks_in(model) == kept
        assert ranks_in(get_peft_model(mixtral(), allocation.to_lora_config(model.peft_config["default"]))) == kept


def test_layers_that_lose_their_adapter_and_cannot_be_named():
    """PEFT uses the last parts of the names that an expression matches, and would adapt other layers as well."""
    config = fused_config(["q_proj", "w1", "w2", "w3"], r_min=0, layers_to_transform=[0, 1], layers_pattern="layers")
    uniform_ranks(mixtral, config)
    scores = get_fim_scores(mixtral(), lm_batches(), config, show_progress_bar=False)
    content = scores.to_dict()
    name = next(name for name in scores if name.endswith("q_proj"))
    content["layers"][name]["mean"] = 0.0
    allocation = RankAllocation.from_scores(FimScores.from_dict(content), config)
    assert name in allocation.dropped_layers
    with pytest.raises(ValueError, match=r"should lose its adapter, .* set r_min=1"):
        allocation.to_lora_config(config)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear", r".*\.q_proj", None])
def test_nothing_is_converted_for_other_models(targets):
    scores = get_fim_scores(llama(), lm_batches(), fused_config(targets), show_progress_bar=False)
    assert scores.converted_targets is None
    assert "converted_targets" not in scores.to_dict()


def test_parameters_that_the_config_names_itself():
    config = fused_config(["q_proj"], target_parameters=["experts.gate_up_proj"])
    scores = get_fim_scores(mixtral(), lm_batches(), config, show_progress_bar=False)
    allocation = RankAllocation.from_scores(scores, config)
    assert allocation.budget == 4 * R
    assert ranks_in(get_peft_model(mixtral(), allocation.to_lora_config(config))) == allocation.ranks


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": "q_proj"},
        {"target_modules": [3]},
        {"target_parameters": ["\x1b[2J"]},
        {"fused": {"model.layers.0.mlp.experts.gate_up_proj": 1}},
        {"fused": {"model.layers.0.mlp.experts.gate_up_proj": 2.0}},
        {"fused": ["a"]},
    ],
)
def test_damaged_files(tmp_path, change):
    config = fused_config(["q_proj", "w1", "w2", "w3"])
    uniform_ranks(mixtral, config)
    path = tmp_path / "scores.json"
    get_fim_scores(mixtral(), lm_batches(), config, show_progress_bar=False).save(path)
    content = json.loads(path.read_text())
    assert content["converted_targets"]["fused"] != {}
    content["converted_targets"] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(InvalidFileError, match=r"scores\.json is damaged"):
        FimScores.load(path)


@pytest.mark.parametrize("options", [[], ["--r-min", 0, "--score-exponent", 1.5], ["--serving"]])
def test_the_command(tmp_path, options):
    uniform_ranks(mixtral, fused_config(["q_proj", "w1", "w2", "w3"]))
    torch.manual_seed(0)
    config = MixtralConfig(num_local_experts=4, **(COMMON | {"vocab_size": len(VOCABULARY)}))
    MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    data = write_jsonl(tmp_path / "data.jsonl", [{"text": text} for text in texts(8)])
    folder = tmp_path / "out"
    options = ["-r", R, "--target-modules", "q_proj,w1,w2,w3", "--budget", "rank", *options]
    assert allocate(tmp_path / "model", data, folder, *options) == 0
    allocation = RankAllocation.load(folder / ALLOCATION_FILE)
    # q_proj, gate_up_proj and down_proj of two layers.
    assert allocation.budget == 2 * (R + 2 * R + R)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapted = get_peft_model(model, LoraConfig.from_pretrained(folder))
    assert ranks_in(adapted) == {name: rank for name, rank in allocation.ranks.items() if rank}
