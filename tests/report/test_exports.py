"""What other tools and PEFT read from an exported allocation."""

import csv
import io
import json
import re
from dataclasses import replace

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from fim_lora import FimScores, LayerScore, RankAllocation
from fim_lora.report.exports import FORMATS, export
from helpers.proportional import proportional
from helpers.spectra import compression, spectrum
from helpers.tiny_models import llama, names_of

TARGETS = ("q_proj", "v_proj", "down_proj")


def scores():
    model = llama()
    return FimScores(
        {
            name: LayerScore(3.0**-place / 7, None if place == 1 else 1e-17, 4, tuple(layer.weight.shape))
            for place, (name, layer) in enumerate(
                (name, model.get_submodule(name)) for name in names_of(model, *TARGETS)
            )
        },
        num_batches=2,
    )


def base_config(**options):
    return LoraConfig(**({"r": 8, "lora_alpha": 16, "target_modules": list(TARGETS)} | options))


def allocated(**options):
    config = base_config(**options)
    allocation = RankAllocation.from_scores(scores(), config)
    assert len(set(allocation.ranks.values())) > 2
    return allocation, allocation.to_lora_config(config)


def layers_of(config):
    """Layer name to rank and scaling, as PEFT builds it from `config`."""
    model = get_peft_model(llama(), config)
    return {
        name.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def layers_meant(allocation):
    exponent = 0.5 if allocation.use_rslora else 1
    return {
        name: (rank, pytest.approx(allocation.alphas[name] / rank**exponent, rel=1e-12))
        for name, rank in allocation.ranks.items()
        if rank > 0
    }


def axolotl_config(text):
    """What axolotl 0.21.0 makes of its YAML: the types of its schema, then the arguments of its loader for PEFT."""
    content = yaml.safe_load(text)
    assert content.pop("adapter") == "lora"
    for key in ("lora_r", "lora_alpha"):
        assert type(content[key]) is int
    for key in ("lora_rank_pattern", "lora_alpha_pattern"):
        assert all(type(value) is int and value > 0 for value in content.get(key, {}).values())
    always = {
        "r": content.pop("lora_r"),
        "lora_alpha": content.pop("lora_alpha"),
        "target_modules": content.pop("lora_target_modules", []),
        "target_parameters": content.pop("lora_target_parameters", []),
        "lora_dropout": content.pop("lora_dropout", 0.0),
        "fan_in_fan_out": content.pop("lora_fan_in_fan_out", None),
        "modules_to_save": content.pop("lora_modules_to_save", None),
    }
    if_true = {
        "init_lora_weights": content.pop("peft_init_lora_weights", None),
        "use_dora": content.pop("peft_use_dora", None),
        "use_rslora": content.pop("peft_use_rslora", None),
        "rank_pattern": content.pop("lora_rank_pattern", None),
        "alpha_pattern": content.pop("lora_alpha_pattern", None),
        "layer_replication": content.pop("peft_layer_replication", None),
    }
    assert content == {}
    passed_on = {key: value for key, value in if_true.items() if value}
    return LoraConfig(**always, **passed_on, bias="none", task_type="CAUSAL_LM")


def test_csv_has_a_row_for_each_layer():
    allocation, config = allocated()
    rows = list(csv.DictReader(io.StringIO(export(allocation, config, "csv"))))
    assert list(rows[0]) == ["layer", "norm", "mean_efim", "standard_error", "rank"]
    assert {row["layer"]: int(row["rank"]) for row in rows} == allocation.ranks
    for row in rows:
        score = allocation.scores[row["layer"]]
        assert (float(row["norm"]), float(row["mean_efim"])) == (score.norm, score.mean)
        assert row["standard_error"] == ("" if score.standard_error is None else repr(score.standard_error))
    assert [row["standard_error"] for row in rows].count("") == 1


def without_first_layer(**options):
    allocation, _ = allocated(**options)
    first = next(iter(allocation.ranks))
    without = replace(allocation, ranks=allocation.ranks | {first: 0})
    return first, without, without.to_lora_config(base_config(**options))


def test_csv_shows_layers_without_rank():
    first, allocation, config = without_first_layer()
    rows = list(csv.DictReader(io.StringIO(export(allocation, config, "csv"))))
    assert {row["layer"]: row["rank"] for row in rows}[first] == "0"


def test_csv_of_a_compression_has_the_ranks_before_and_the_parameters():
    chosen = compression(spectrum(), 0.25)
    rows = list(csv.DictReader(io.StringIO(export(chosen, base_config(), "csv"))))
    assert list(rows[0]) == ["layer", "rank_before", "parameters", "rank"]
    assert {row["layer"]: int(row["rank"]) for row in rows} == chosen.ranks
    assert {row["layer"]: int(row["rank_before"]) for row in rows} == chosen.ranks_before
    assert sum(int(row["parameters"]) for row in rows) == chosen.num_parameters
    formula = compression(spectrum(["=1+1", "layers.0.a"]))
    with pytest.raises(ValueError, match="would evaluate the layer name '=1\\+1' as a formula"):
        export(formula, base_config(), "csv")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_alpha": 8},
        {"lora_alpha": 16.0},
        {"use_dora": True, "lora_dropout": 0.1},
        {"lora_alpha": 3, "fim_config": proportional(adjust_scaling_factors=False), "init_lora_weights": "fim"},
        {
            "use_rslora": True,
            "fim_config": proportional(adjust_scaling_factors=False),
            "init_lora_weights": "fim",
        },
        {"init_lora_weights": "gaussian"},
        {"target_modules": r".*\.(q_proj|v_proj|down_proj)"},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj", "o_proj", "gate_proj", "up_proj"]},
        {"layers_to_transform": [0, 1]},
    ],
)
def test_axolotl_builds_the_ranks_and_scalings(options):
    allocation, config = allocated(**options)
    read = axolotl_config(export(allocation, config, "axolotl"))
    assert layers_of(read) == layers_meant(allocation)
    assert (read.use_dora, read.lora_dropout) == (config.use_dora, config.lora_dropout)
    assert read.init_lora_weights == config.init_lora_weights


def test_axolotl_gets_only_what_is_needed():
    allocation, config = allocated()
    content = yaml.safe_load(export(allocation, config, "axolotl"))
    assert content == {
        "adapter": "lora",
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_target_modules": sorted(TARGETS),
        "lora_rank_pattern": allocation.rank_pattern,
        "lora_alpha_pattern": allocation.alpha_pattern,
    }


@pytest.mark.parametrize("file_format", ["axolotl", "peft"])
@pytest.mark.parametrize(
    "options", [{}, {"target_modules": "all-linear", "exclude_modules": ["k_proj", "o_proj", "gate_proj", "up_proj"]}]
)
def test_layers_of_rank_0_get_no_adapter(file_format, options):
    first, allocation, config = without_first_layer(**options)
    meant = layers_meant(allocation)
    assert first not in meant
    text = export(allocation, config, file_format)
    read = axolotl_config(text) if file_format == "axolotl" else LoraConfig(**json.loads(text))
    assert layers_of(read) == meant


def test_axolotl_gets_whole_names_where_layers_were_left_out():
    allocation, config = allocated(exclude_modules=["vision"])
    pattern = yaml.safe_load(export(allocation, config, "axolotl"))["lora_target_modules"]
    assert all(re.fullmatch(pattern, name) for name in allocation.ranks)
    assert not any(re.fullmatch(pattern, f"vision.{name}") for name in allocation.ranks)


def test_axolotl_gets_sets_and_tuples_as_lists():
    allocation, config = allocated(layer_replication=[(0, 2)], modules_to_save=["lm_head"])
    content = yaml.safe_load(export(allocation, replace(config, target_parameters={"b", "a"}), "axolotl"))
    assert content["peft_layer_replication"] == [[0, 2]]
    assert content["lora_modules_to_save"] == ["lm_head"]
    assert content["lora_target_parameters"] == ["a", "b"]


def test_axolotl_gets_no_modules_where_only_parameters_are_targeted():
    allocation, config = allocated()
    config = replace(config, target_modules=None, target_parameters=["experts.down_proj"])
    assert "lora_target_modules" not in yaml.safe_load(export(allocation, config, "axolotl"))


@pytest.mark.parametrize("options", [{"lora_alpha": 5}, {"use_rslora": True}])
def test_axolotl_takes_no_fractional_alphas(options):
    allocation, config = allocated(**options)
    with pytest.raises(ValueError, match=r"integers as alphas, but alpha_pattern\['model.layers.*multiple of r"):
        export(allocation, config, "axolotl")


@pytest.mark.parametrize(
    ("field", "value"),
    [("bias", "all"), ("init_lora_weights", False), ("lora_bias", True), ("eva_config", {"rho": 2.0})],
)
def test_axolotl_is_not_given_another_adapter(field, value):
    allocation, config = allocated()
    setattr(config, field, value)
    with pytest.raises(ValueError, match=f"has no field for {field}={value!r}"):
        export(allocation, config, "axolotl")


def test_peft_reads_its_own_format(tmp_path):
    allocation, config = allocated()
    text = export(allocation, config, "peft")
    assert layers_of(LoraConfig(**json.loads(text))) == layers_meant(allocation)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert json.loads(text) == saved | {"target_modules": sorted(TARGETS)}
    assert config.target_modules == set(TARGETS)


@pytest.mark.parametrize(("file_format", "options"), [("axolotl", {}), ("peft", {}), ("peft", {"use_rslora": True})])
def test_servers_read_one_scaling(file_format, options):
    config = base_config(**options)
    allocation = RankAllocation.from_scores(scores(), config)
    serving = allocation.to_lora_config(config, serving=True)
    text = export(allocation, serving, file_format)
    read = axolotl_config(text) if file_format == "axolotl" else LoraConfig(**json.loads(text))
    assert read.r == max(allocation.ranks.values())
    assert layers_of(read) == layers_meant(allocation)


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_text_ends_its_line_and_changes_nothing(file_format):
    allocation, config = allocated()
    before = config.to_dict()
    text = export(allocation, config, file_format)
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert text == export(allocation, config, file_format)
    assert config.to_dict() == before


def test_unknown_formats_are_refused():
    allocation, config = allocated()
    with pytest.raises(ValueError, match="Unknown export format 'toml': choose one of csv, axolotl, peft"):
        export(allocation, config, "toml")
