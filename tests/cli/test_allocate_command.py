"""`fim-lora allocate`: what it writes and prints."""

import json
import subprocess
import sys
from datetime import datetime, timedelta

import pytest
from matplotlib.image import imread
from peft import LoraConfig

from fim_lora import FimConfig, RankAllocation
from fim_lora.runtime import progress
from fim_lora_command import main
from helpers.cli_inputs import OUR_FILES, allocate, files, texts, write_jsonl


@pytest.mark.parametrize("options", [[], ["--exact"]])
def test_long_examples_are_read_exactly_if_asked_for(llama, data, tmp_path, options):
    assert allocate(llama, data, tmp_path / "out", *options) == 0
    assert RankAllocation.load(tmp_path / "out" / "fim_allocation.json").fim_config.exact == bool(options)


def test_allocate_writes_three_files_and_nothing_else(llama, data, tmp_path, capsys):
    assert allocate(llama, data, tmp_path / "out") == 0
    assert files(tmp_path / "out") == OUR_FILES
    assert files(tmp_path) == ["out"]
    captured = capsys.readouterr()
    assert captured.err == ""
    for word in (
        "1,024 of 1,024 parameters used",
        "4 examples in 2 batches",
        "Truncated",
        "0 of 4",
        "loading",
        "GiB",
        "q_proj",
    ):
        assert word in captured.out
    assert imread(tmp_path / "out" / "rank_map.png").size > 0


def test_the_files_say_the_same_and_where_they_come_from(llama, data, tmp_path):
    assert allocate(llama, data, tmp_path / "out", "-r", 4, "--seed", 7) == 0
    allocation = RankAllocation.load(tmp_path / "out" / "fim_allocation.json")
    config = LoraConfig.from_pretrained(str(tmp_path / "out"))
    assert (config.r, config.lora_alpha, config.task_type) == (4, 4, "CAUSAL_LM")
    assert config.base_model_name_or_path == str(llama)
    assert config.target_modules == {"q_proj", "v_proj"}
    assert config.rank_pattern == allocation.rank_pattern
    assert config.alpha_pattern == allocation.alpha_pattern
    content = json.loads((tmp_path / "out" / "fim_allocation.json").read_text())
    provenance = content["provenance"]
    assert set(provenance["versions"]) >= {"fim-lora", "peft", "transformers", "torch", "python"}
    assert provenance["model"]["name"] == str(llama)
    assert datetime.fromisoformat(provenance["date"]).utcoffset() == timedelta(0)
    assert provenance["data"]["columns"] == {"text": "text"}
    assert len(provenance["data"]["sha256"]) == 64
    for key, value in {"seed": 7, "max_length": 512, "batch_size": 2, "task": "causal-lm", "dtype": "float32"}.items():
        assert provenance[key] == value


def test_defaults_are_those_of_the_config(llama, data, tmp_path):
    arguments = ["--model", str(llama), "--data", str(data), "--output", str(tmp_path / "out")]
    assert main(["allocate", *arguments]) == 0
    allocation = RankAllocation.load(tmp_path / "out" / "fim_allocation.json")
    assert allocation.fim_config == FimConfig()
    assert (allocation.r, allocation.lora_alpha) == (LoraConfig.r, LoraConfig.r)


def test_the_same_seed_gives_the_same_scores(llama, data, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert allocate(llama, data, tmp_path / name, "--seed", seed) == 0
    a, b, c = (RankAllocation.load(tmp_path / name / "fim_allocation.json").scores for name in "abc")
    assert a == b != c


def test_options_reach_the_allocation(llama, data, tmp_path):
    options = ["-r", 4, "--r-min", 2, "--r-max", 6, "--budget", "rank", "--score", "mean", "--score-exponent", 0.5]
    assert allocate(llama, data, tmp_path / "out", *options, "--lora-alpha", 12, "--target-modules", "all-linear") == 0
    allocation = RankAllocation.load(tmp_path / "out" / "fim_allocation.json")
    assert allocation.fim_config == FimConfig(2, r_min=2, r_max=6, budget="rank", score="mean", score_exponent=0.5)
    assert (allocation.r, allocation.lora_alpha, len(allocation.ranks)) == (4, 12, 14)
    assert set(allocation.ranks.values()) <= set(range(2, 7))


@pytest.mark.parametrize(
    ("target_modules", "layers"),
    [("q_proj", 2), ("q_proj, k_proj", 4), (r".*\.1\..*(up|down)_proj", 2), ("model.layers.0.mlp.up_proj", 1)],
)
def test_target_modules(llama, data, tmp_path, target_modules, layers):
    assert allocate(llama, data, tmp_path / "out", "--target-modules", target_modules) == 0
    assert len(RankAllocation.load(tmp_path / "out" / "fim_allocation.json").ranks) == layers


# Every warning is an error, except this one, which PEFT triggers in transformers for any adapter.
WARNINGS = ["-W", "error", "-W", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"]
STOCK_PEFT = """
import json, sys
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import {model_class}

config = LoraConfig.from_pretrained(sys.argv[2])
model = get_peft_model({model_class}.from_pretrained(sys.argv[1], {arguments}), config)
layers = {{name.removeprefix("base_model.model."): layer for name, layer in model.named_modules()}}
found = {{name: [layer.r["default"], layer.scaling["default"]]
          for name, layer in layers.items() if isinstance(layer, LoraLayer)}}
assert "fim_lora" not in sys.modules
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("task", "model_class", "arguments"),
    [("causal-lm", "LlamaForCausalLM", ""), ("seq-cls", "BertForSequenceClassification", "num_labels=3")],
)
def test_stock_peft_builds_the_adapter(llama, bert, data, labeled, tmp_path, task, model_class, arguments):
    model = llama if task == "causal-lm" else bert
    options = ["--target-modules", "all-linear", "--task", task]
    if task == "seq-cls":
        options += ["--column", "text=sentence"]
    assert allocate(model, data if task == "causal-lm" else labeled, tmp_path / "out", *options) == 0
    code = STOCK_PEFT.format(model_class=model_class, arguments=arguments)
    result = subprocess.run(
        [sys.executable, *WARNINGS, "-c", code, str(model), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    allocation = RankAllocation.load(tmp_path / "out" / "fim_allocation.json")
    assert json.loads(result.stdout) == {name: [rank, 1.0] for name, rank in allocation.ranks.items()}


def test_classification_warns_of_its_random_head(bert, labeled, tmp_path, capsys):
    options = ["--task", "seq-cls", "--column", "text=sentence"]
    assert allocate(bert, labeled, tmp_path / "out", *options) == 0
    assert "start at random values: classifier.bias, classifier.weight" in capsys.readouterr().err
    content = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert content["task_type"] == "SEQ_CLS"


def test_a_decoder_classifies_padded_texts(llama, labeled, tmp_path):
    assert allocate(llama, labeled, tmp_path / "out", "--task", "seq-cls", "--column", "text=sentence") == 0


@pytest.mark.parametrize(
    "rows",
    [
        [{"question": "w1 ", "answer": "w2 w3"}] * 4,
        [{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}] * 4,
    ],
)
def test_other_kinds_of_examples(llama, tmp_path, rows):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    options = ["--column", "prompt=question", "--column", "completion=answer"] if "question" in rows[0] else []
    assert allocate(llama, path, tmp_path / "out", *options) == 0


def test_truncation_is_told(llama, data, tmp_path, capsys):
    assert allocate(llama, data, tmp_path / "out", "--max-length", 3) == 0
    assert "4 of 4 examples to 3 tokens" in capsys.readouterr().out


def test_a_warning_of_the_library_is_one_line(llama, tmp_path, capsys):
    path = write_jsonl(tmp_path / "few.jsonl", [{"text": text} for text in texts(2)])
    assert allocate(llama, path, tmp_path / "out") == 0
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("fim-lora: warning: The dataloader yielded 1 batches")


def test_bfloat16(llama, data, tmp_path):
    assert allocate(llama, data, tmp_path / "out", "--dtype", "bfloat16") == 0
    assert json.loads((tmp_path / "out" / "fim_allocation.json").read_text())["provenance"]["dtype"] == "bfloat16"


def test_without_a_terminal_progress_is_lines(llama, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_PER_LINE", 0.001)
    assert allocate(llama, data, tmp_path / "out") == 0
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert any(line.startswith("eFIM: 100%") and " 2/2 " in line for line in lines)
    assert {line.partition(":")[0] for line in lines} <= {"loading", "Tokenizing", "eFIM"}
    assert "\r" not in captured.err
