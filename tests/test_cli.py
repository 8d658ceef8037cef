import csv
import io
import json
import os
import subprocess
import sys
from dataclasses import replace

import datasets
import pytest
import torch
import yaml
from matplotlib.image import imread
from peft import LoraConfig
from transformers import LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import fim_lora
import fim_lora.cli.allocate
import fim_lora.cli.models
from cli_inputs import allocate, save_bert, save_llama, texts, word_tokenizer, write_jsonl
from fim_lora import FimConfig, RankAllocation
from fim_lora_command import main

OUR_FILES = ["adapter_config.json", "fim_allocation.json", "rank_map.png"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = [{"text": text} for text in texts(12)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", rows)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    rows = [{"sentence": text, "label": label} for text, label in zip(texts(12), "abc" * 4, strict=True)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "labelled.jsonl", rows)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def error_line(capsys):
    """The one line on stderr."""
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("fim-lora: error: ")
    return line.removeprefix("fim-lora: error: ")


# --- What is written ---------------------------------------------------------------------------------------------


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
    for word in ("32 of 32 ranks used", "4 examples in 2 batches", "Truncated", "0 of 4", "loading", "GiB", "q_proj"):
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
    options = ["-r", 4, "--r-min", 2, "--r-max", 6, "--budget", "parameters", "--score-exponent", 0.5]
    assert allocate(llama, data, tmp_path / "out", *options, "--lora-alpha", 12, "--target-modules", "all-linear") == 0
    allocation = RankAllocation.load(tmp_path / "out" / "fim_allocation.json")
    assert allocation.fim_config == FimConfig(2, r_min=2, r_max=6, budget="parameters", score_exponent=0.5)
    assert (allocation.r, allocation.lora_alpha, len(allocation.ranks)) == (4, 12, 14)
    assert set(allocation.ranks.values()) <= set(range(2, 7))


@pytest.mark.parametrize(
    ("target_modules", "layers"),
    [("q_proj", 2), ("q_proj, k_proj", 4), (r".*\.1\..*(up|down)_proj", 2), ("model.layers.0.mlp.up_proj", 1)],
)
def test_target_modules(llama, data, tmp_path, target_modules, layers):
    assert allocate(llama, data, tmp_path / "out", "--target-modules", target_modules) == 0
    assert len(RankAllocation.load(tmp_path / "out" / "fim_allocation.json").ranks) == layers


# Every warning is an error but this one, which PEFT raises in transformers for any adapter.
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
def test_stock_peft_builds_the_adapter(llama, bert, data, labelled, tmp_path, task, model_class, arguments):
    model = llama if task == "causal-lm" else bert
    options = ["--target-modules", "all-linear", "--task", task]
    if task == "seq-cls":
        options += ["--column", "text=sentence"]
    assert allocate(model, data if task == "causal-lm" else labelled, tmp_path / "out", *options) == 0
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


def test_classification_warns_of_its_random_head(bert, labelled, tmp_path, capsys):
    options = ["--task", "seq-cls", "--column", "text=sentence"]
    assert allocate(bert, labelled, tmp_path / "out", *options) == 0
    assert "start at random values: classifier.bias, classifier.weight" in capsys.readouterr().err
    content = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert content["task_type"] == "SEQ_CLS"


def test_a_decoder_classifies_padded_texts(llama, labelled, tmp_path):
    assert allocate(llama, labelled, tmp_path / "out", "--task", "seq-cls", "--column", "text=sentence") == 0


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


# --- The output folder -------------------------------------------------------------------------------------------


def test_a_folder_with_something_in_it_needs_overwrite(llama, data, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "rank_map.png").write_text("old")
    # Said before the model is looked for.
    assert allocate(tmp_path / "no-model", data, out) == 1
    assert "--overwrite" in error_line(capsys)
    assert allocate(llama, data, out, "--overwrite") == 0
    assert files(out) == sorted([*OUR_FILES, "notes.txt"])
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "rank_map.png").read_bytes().startswith(b"\x89PNG")


def test_an_empty_folder_and_missing_parents_are_used(llama, data, tmp_path):
    (tmp_path / "empty").mkdir()
    assert allocate(llama, data, tmp_path / "empty") == 0
    assert allocate(llama, data, tmp_path / "a" / "b") == 0
    assert files(tmp_path / "empty") == files(tmp_path / "a" / "b") == OUR_FILES


def test_the_result_can_be_read_as_far_as_the_umask_allows(llama, data, tmp_path):
    assert allocate(llama, data, tmp_path / "out") == 0
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "plain.txt").write_text("")
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {(tmp_path / "plain.txt").stat().st_mode}


def test_an_output_that_is_a_file(llama, data, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert allocate(llama, data, tmp_path / "out") == 1
    assert "is no folder" in error_line(capsys)
    assert allocate(llama, data, tmp_path / "out" / "below") == 1
    assert "cannot be made" in error_line(capsys)


def test_a_folder_without_permission(llama, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert allocate(llama, data, tmp_path / "out") == 1
    assert "Permission denied" in error_line(capsys)


def _interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def _fail(*args, **kwargs):
    raise OSError(28, "No space left on device", "somewhere")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("place", "name"), [(LlamaForCausalLM, "forward"), (fim_lora.cli.allocate, "draw_rank_map")], ids=["run", "write"]
)
def test_an_interruption_leaves_no_trace(llama, data, tmp_path, capsys, monkeypatch, place, name, overwrite):
    out = tmp_path / "out"
    if overwrite:
        out.mkdir()
        (out / "adapter_config.json").write_text("old")
    monkeypatch.setattr(place, name, _interrupt)
    assert allocate(llama, data, out, "--overwrite") == 130
    assert capsys.readouterr().err == "fim-lora: interrupted\n"
    assert files(tmp_path) == (["out"] if overwrite else [])
    if overwrite:
        assert files(out) == ["adapter_config.json"]
        assert (out / "adapter_config.json").read_text() == "old"


def test_a_full_disk_leaves_no_trace(llama, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fim_lora.cli.allocate, "draw_rank_map", _fail)
    assert allocate(llama, data, tmp_path / "out") == 1
    assert error_line(capsys) == "somewhere: No space left on device"
    assert files(tmp_path) == []


# --- Errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--r-min", 9], "'--r-min': 9 is above -r 8"),
        (["--r-max", 7], "'--r-max': 7 is below -r 8"),
        (["--budget", "money"], "'--budget': 'money' is not one of rank, parameters"),
        (["--task", "chess"], "'--task': 'chess' is not one of causal-lm, seq-cls"),
        (["--dtype", "int8"], "'--dtype': 'int8' is not one of auto, float32"),
        (["--device", "abacus"], "'--device': 'abacus' cannot be used"),
        (["--score-exponent", 0], "score_exponent must be positive"),
        (["--score-exponent", "nan"], "score_exponent must be positive"),
        (["-r", 0], "'-r': "),
        (["--batch-size", 0], "'--batch-size': "),
        (["--max-length", 1], "'--max-length': "),
        (["--column", "text"], "'--column': 'text' is not ROLE=NAME"),
        (["--column", "topic=x"], "'--column': 'topic' is not one of messages, prompt"),
        (["--column", "text=a", "--column", "text=b"], "'--column': text is given twice"),
        (["--target-modules", "(q_proj"], "'--target-modules': '(q_proj' is no regular expression"),
        (["--target-modules", "q_proj,"], "'--target-modules': 'q_proj,' has an empty name"),
        (["--nonsense"], "No such option: --nonsense"),
    ],
)
def test_wrong_usage(tmp_path, capsys, options, message):
    # Neither model nor data exist: usage is looked at first.
    assert allocate(tmp_path / "model", tmp_path / "data", tmp_path / "out", *options) == 2
    line = error_line(capsys)
    assert message in line
    assert line.endswith("(see fim-lora allocate --help)")
    assert files(tmp_path) == []


def test_a_missing_command_or_option(capsys):
    assert main([]) == 2
    assert "Missing command" in error_line(capsys)
    assert main(["allocate"]) == 2
    assert "Missing option" in error_line(capsys)


def test_help_and_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fim-lora {fim_lora.__version__}\n"
    assert main(["allocate", "--help"]) == 0
    assert "--score-exponent" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing/model", "no such file or folder. Give the path of one, or the name of a model of the hub"),
        ("missing.gguf", "no such file or folder"),
        ("empty", "is no model: the folder has no config.json"),
        ("adapter", "is an adapter, not a model"),
        ("quantised", "give the GGUF file itself"),
        ("notes.txt", "is no model: give a GGUF file"),
        ("broken", "broken cannot be loaded"),
        ("unknown", "unknown cannot be loaded"),
        ("encoder-decoder", "Unrecognized configuration class"),
        ("broken.gguf", "broken.gguf cannot be loaded"),
    ],
)
def test_not_a_model(data, tmp_path, capsys, name, message):
    for folder, file, content in (
        ("empty", None, None),
        ("adapter", "adapter_config.json", "{}"),
        ("quantised", "a.gguf", "x"),
        ("broken", "config.json", "{"),
        ("unknown", "config.json", '{"model_type": "chess_engine"}'),
        (".", "notes.txt", "x"),
        (".", "broken.gguf", "x"),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        if file is not None:
            (tmp_path / folder / file).write_text(content)
    if name == "encoder-decoder":
        T5ForConditionalGeneration(
            T5Config(vocab_size=60, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        ).save_pretrained(tmp_path / name)
        word_tokenizer().save_pretrained(tmp_path / name)
        capsys.readouterr()
    assert allocate(tmp_path / name, data, tmp_path / "out") == 1
    assert message in error_line(capsys)
    assert not (tmp_path / "out").exists()


def test_a_model_that_the_hub_does_not_have(data, tmp_path, capsys):
    assert allocate("nobody/nothing", data, tmp_path / "out") == 1
    assert "nobody/nothing" in error_line(capsys)


def test_a_model_without_tokenizer(data, tmp_path, capsys):
    save_llama(tmp_path / "model")
    for path in (tmp_path / "model").glob("tokenizer*"):
        path.unlink()
    capsys.readouterr()
    assert allocate(tmp_path / "model", data, tmp_path / "out") == 1
    assert "tokenizer" in error_line(capsys)


def test_a_tokenizer_of_another_model(data, tmp_path, capsys):
    save_llama(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    model.resize_token_embeddings(5)
    model.save_pretrained(tmp_path / "model")
    capsys.readouterr()
    assert allocate(tmp_path / "model", data, tmp_path / "out") == 1
    assert "do not belong together" in error_line(capsys)


def test_more_tokens_than_positions(bert, tmp_path, capsys):
    rows = [{"text": text, "label": label} for text, label in zip(texts(4, 20), "abab", strict=True)]
    path = write_jsonl(tmp_path / "long.jsonl", rows)
    assert allocate(bert, path, tmp_path / "out", "--task", "seq-cls") == 1
    assert "give --max-length 16" in capsys.readouterr().err
    assert allocate(bert, path, tmp_path / "out", "--task", "seq-cls", "--max-length", 16) == 0


def test_targets_that_are_not_there(llama, data, tmp_path, capsys):
    assert allocate(llama, data, tmp_path / "out", "--target-modules", "nope") == 1
    assert "nope" in error_line(capsys)


def test_a_layer_that_peft_cannot_adapt(llama, data, tmp_path, capsys):
    assert allocate(llama, data, tmp_path / "out", "--target-modules", "input_layernorm") == 1
    assert "Target module LlamaRMSNorm" in error_line(capsys)


def test_an_architecture_without_default_targets(llama, data, tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(fim_lora.cli.models.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, "llama")
    assert allocate(llama, data, tmp_path / "out") == 1
    assert "give --target-modules" in error_line(capsys)


def test_ranks_that_no_layer_can_have(llama, data, tmp_path, capsys):
    assert allocate(llama, data, tmp_path / "out", "-r", 40, "--r-min", 30) == 1
    assert "cannot have rank 30" in error_line(capsys)


def test_bad_data(llama, tmp_path, capsys):
    assert allocate(llama, tmp_path / "missing.jsonl", tmp_path / "out") == 1
    assert "no such file. Give the path of one, or the name of a data set of the hub" in error_line(capsys)
    (tmp_path / "bad.jsonl").write_text('{"text": "w1"}\n{"text": \n')
    assert allocate(llama, tmp_path / "bad.jsonl", tmp_path / "out") == 1
    assert "bad.jsonl cannot be read" in error_line(capsys)
    path = write_jsonl(tmp_path / "data.jsonl", [{"question": "w1"}])
    assert allocate(llama, path, tmp_path / "out") == 1
    assert "--column text='question'" in error_line(capsys)
    assert allocate(llama, path, tmp_path / "out", "--column", "text=answer") == 1
    assert "no column 'answer'" in error_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory(llama, data, tmp_path, capsys, monkeypatch, error):
    def forward(*args, **kwargs):
        raise error

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    assert allocate(llama, data, tmp_path / "out") == 1
    assert "lower --batch-size" in error_line(capsys)


def test_a_traceback_only_on_request(llama, data, tmp_path, capsys, monkeypatch):
    def forward(*args, **kwargs):
        raise KeyError("surprise")

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    assert allocate(llama, data, tmp_path / "out") == 1
    assert error_line(capsys).startswith("Unexpected KeyError: 'surprise' (set FIM_LORA_DEBUG=1")
    monkeypatch.setenv("FIM_LORA_DEBUG", "1")
    assert allocate(llama, data, tmp_path / "out") == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_without_the_extra():
    code = "import sys; sys.modules['matplotlib'] = None; import fim_lora_command; sys.exit(fim_lora_command.main([]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert "matplotlib" in line
    assert "pip install 'fim-lora[cli]'" in line


# --- show --------------------------------------------------------------------------------------------------------


def test_show_prints_the_table_and_draws_the_map_again(llama, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert allocate(llama, data, out) == 0
    printed = capsys.readouterr().out
    picture = (out / "rank_map.png").read_bytes()
    (out / "rank_map.png").unlink()
    assert main(["show", str(out)]) == 0
    shown = capsys.readouterr().out
    assert printed.split("Ranks in", 1)[1] == shown.split("Ranks in", 1)[1]
    assert (out / "rank_map.png").read_bytes() == picture
    assert files(out) == OUR_FILES


def test_show_refuses_what_is_no_allocation(tmp_path, capsys):
    assert main(["show", str(tmp_path / "nope")]) == 1
    assert "fim_allocation.json: no such file. Give the folder that" in error_line(capsys)
    (tmp_path / "fim_allocation.json").write_text("{}")
    assert main(["show", str(tmp_path)]) == 1
    assert "is not a fim_allocation file" in error_line(capsys)


def test_show_reads_a_folder_for_servers(llama, data, tmp_path, capsys):
    assert allocate(llama, data, tmp_path / "plain") == 0
    assert allocate(llama, data, tmp_path / "serving", "--serving") == 0
    capsys.readouterr()
    shown = []
    for name in ("plain", "serving"):
        assert main(["show", str(tmp_path / name)]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]


def test_the_installed_command_tells_errors_by_its_exit_code(tmp_path):
    code = "import sys; from fim_lora_command import main; sys.exit(main())"
    result = subprocess.run(
        [sys.executable, "-c", code, "show", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1


# --- export ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def allocated(llama, data, tmp_path_factory):
    """Folders of one allocation: an ordinary one, and one for servers."""
    folder = tmp_path_factory.mktemp("allocated")
    assert allocate(llama, data, folder / "plain", "--target-modules", "all-linear") == 0
    assert allocate(llama, data, folder / "serving", "--target-modules", "all-linear", "--serving") == 0
    return folder


def copied(folder, target):
    """A folder of the same allocation that a test may damage."""
    target.mkdir()
    for name in ("adapter_config.json", "fim_allocation.json"):
        (target / name).write_bytes((folder / "plain" / name).read_bytes())
    return target


def export(folder, *options):
    return main(["export", *[str(word) for word in (folder, *options)]])


def test_serving_puts_the_largest_rank_and_its_alpha_into_the_config(allocated):
    plain, serving = (LoraConfig.from_pretrained(str(allocated / name)) for name in ("plain", "serving"))
    allocation = RankAllocation.load(allocated / "serving" / "fim_allocation.json")
    assert allocation == RankAllocation.load(allocated / "plain" / "fim_allocation.json")
    assert (plain.r, plain.lora_alpha) == (8, 8)
    assert serving.r == serving.lora_alpha == max(allocation.ranks.values()) > 8


@pytest.mark.parametrize("name", ["plain", "serving"])
def test_export_prints_nothing_but_the_text(allocated, name, capsys):
    allocation = RankAllocation.load(allocated / name / "fim_allocation.json")
    assert export(allocated / name, "--format", "csv") == 0
    rows = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert {row["layer"]: int(row["rank"]) for row in rows} == allocation.ranks
    assert export(allocated / name, "--format", "axolotl") == 0
    content = yaml.safe_load(capsys.readouterr().out)
    assert content["lora_rank_pattern"] == content["lora_alpha_pattern"] == allocation.rank_pattern
    assert (content["lora_r"], content["lora_alpha"], content["lora_target_modules"]) == (8, 8, "all-linear")


@pytest.mark.parametrize("source", ["plain", "serving"])
@pytest.mark.parametrize("options", [[], ["--serving"]])
def test_export_writes_the_config_of_either_kind_from_either_kind(allocated, source, options, tmp_path, capsys):
    target = tmp_path / "new" / "adapter_config.json"
    assert export(allocated / source, "--format", "peft", "--output", target, *options) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert files(tmp_path / "new") == ["adapter_config.json"]
    expected = allocated / ("serving" if options else "plain")
    assert LoraConfig.from_pretrained(str(tmp_path / "new")) == LoraConfig.from_pretrained(str(expected))


@pytest.mark.parametrize("serving", [False, True])
def test_export_keeps_layers_without_adapter_out(allocated, tmp_path, capsys, serving):
    allocation = RankAllocation.load(allocated / "plain" / "fim_allocation.json")
    first, *others = allocation.ranks
    allocation = replace(allocation, ranks=allocation.ranks | {first: 0})
    base = LoraConfig.from_pretrained(str(allocated / "plain"))
    allocation.to_lora_config(base, serving=serving).save_pretrained(tmp_path)
    allocation.save(tmp_path / "fim_allocation.json")
    assert export(tmp_path, "--format", "axolotl") == 0
    content = yaml.safe_load(capsys.readouterr().out)
    assert content["lora_target_modules"] == sorted(others)
    assert first not in content["lora_rank_pattern"]


def test_export_replaces_a_file_only_when_told(allocated, tmp_path, capsys):
    target = tmp_path / "ranks.csv"
    target.write_text("mine")
    # Said before the folder is read.
    assert export(tmp_path / "nope", "--format", "csv", "--output", target) == 1
    assert f"{target} exists: give another --output, or --overwrite" in error_line(capsys)
    assert target.read_text() == "mine"
    assert export(allocated / "plain", "--format", "csv", "--output", target, "--overwrite") == 0
    assert target.read_text().startswith("layer,score,")
    assert export(allocated / "plain", "--format", "csv") == 0
    assert capsys.readouterr().out == target.read_text()
    assert files(tmp_path) == ["ranks.csv"]


def test_export_refuses_a_place_where_no_file_can_be(allocated, tmp_path, capsys, monkeypatch):
    assert export(allocated / "plain", "--format", "csv", "--output", tmp_path) == 1
    assert "is a folder" in error_line(capsys)
    (tmp_path / "file").write_text("")
    assert export(allocated / "plain", "--format", "csv", "--output", tmp_path / "file" / "ranks.csv") == 1
    assert "is no folder" in error_line(capsys)
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    assert export(allocated / "plain", "--format", "csv", "--output", tmp_path / "ranks.csv") == 1
    assert "Permission denied" in error_line(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "toml"], "'--format': 'toml' is not one of csv, axolotl, peft"),
        ([], "Missing option '--format'"),
    ],
)
def test_wrong_usage_of_export(allocated, capsys, options, message):
    assert export(allocated / "plain", *options) == 2
    line = error_line(capsys)
    assert message in line
    assert line.endswith("(see fim-lora export --help)")


def test_export_needs_both_files(allocated, tmp_path, capsys):
    folder = copied(allocated, tmp_path / "copy")
    (folder / "adapter_config.json").unlink()
    assert export(folder, "--format", "csv") == 1
    assert "adapter_config.json: no such file, but fim-lora allocate writes one" in error_line(capsys)
    (folder / "fim_allocation.json").unlink()
    assert export(folder, "--format", "csv") == 1
    assert "fim_allocation.json: no such file. Give the folder that" in error_line(capsys)


@pytest.mark.parametrize("content", ["{", "[]", '{"peft_type": "CHESS"}', '{"peft_type": "LORA", "r": "many"}'])
def test_export_refuses_a_damaged_adapter_config(allocated, tmp_path, capsys, content):
    folder = copied(allocated, tmp_path / "copy")
    (folder / "adapter_config.json").write_text(content)
    assert export(folder, "--format", "csv", "--output", tmp_path / "ranks.csv") == 1
    line = error_line(capsys)
    assert "adapter_config.json" in line
    assert line.endswith("llocate again.") or line.endswith("allocate again.")
    assert files(tmp_path) == ["copy"]


@pytest.mark.parametrize("change", [{"rank_pattern": {}}, {"alpha_pattern": {}}, {"use_rslora": True}])
def test_export_refuses_an_adapter_config_of_another_allocation(allocated, tmp_path, capsys, change):
    folder = copied(allocated, tmp_path / "copy")
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(content | change))
    assert export(folder, "--format", "peft") == 1
    assert "has other ranks or scalings than" in error_line(capsys)


def test_export_refuses_another_kind_of_adapter(allocated, tmp_path, capsys):
    folder = copied(allocated, tmp_path / "copy")
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3", "target_modules": ["q_proj"]}')
    assert export(folder, "--format", "peft") == 1
    assert "is no LoRA config" in error_line(capsys)


def test_export_says_what_a_format_cannot(llama, data, tmp_path, capsys):
    assert allocate(llama, data, tmp_path / "out", "--lora-alpha", 5) == 0
    capsys.readouterr()
    assert export(tmp_path / "out", "--format", "axolotl", "--output", tmp_path / "lora.yaml") == 1
    assert "axolotl takes only integers as alphas" in error_line(capsys)
    assert files(tmp_path) == ["out"]
