"""Python code that comes with a model never runs, and no question is asked about it, without `--trust-remote-code`."""

import builtins
import json
import shutil

import pytest
from transformers import dynamic_module_utils

from helpers.cli_inputs import allocate, compress, error_line, texts, write_jsonl

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({marker!r}).touch()

class Config(LlamaConfig):
    model_type = "stranger"

class Model(LlamaForCausalLM):
    config_class = Config

class Words(PreTrainedTokenizerFast):
    pass
"""
MODEL_MAP = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
TOKENIZER_MAP = {"AutoTokenizer": ["own.Words", "own.Words"]}
# Neither of these architectures has a class for its part in transformers, so that the part is built by `AutoModel`.
PARTS = {
    "causal-lm": {"model_type": "fuyu", "text_config": {"model_type": "align_text_model"}},
    "seq-cls": {
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text"},
        "vision_config": {"model_type": "align_vision_model"},
    },
}


@pytest.fixture
def questions(monkeypatch):
    """The questions that were asked; each one is answered with yes."""
    asked = []
    monkeypatch.setattr(builtins, "input", lambda prompt="": asked.append(prompt) or "y")
    return asked


@pytest.fixture
def stranger(llama, tmp_path, monkeypatch):
    """Makes a copy of the model with code of its own, which leaves a file when it runs, and changes its JSON files."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))

    def make(name, **changes):
        folder = shutil.copytree(llama, tmp_path / name)
        (folder / "own.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
        for file, values in changes.items():
            path = folder / f"{file}.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return folder

    return make


def with_own_part(folder, task):
    """The config of a known architecture with a part that names code."""
    config = json.loads(json.dumps(PARTS[task]))
    part = next(value for value in config.values() if isinstance(value, dict) and "align" in value["model_type"])
    part |= {"name_or_path": str(folder), "_name_or_path": str(folder), "auto_map": {"AutoModel": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


CHANGES = {
    "own-config": {"config": {"model_type": "stranger", "auto_map": MODEL_MAP}},
    "own-tokenizer": {"tokenizer_config": {"tokenizer_class": "Words", "auto_map": TOKENIZER_MAP}},
    "old-form": {"tokenizer_config": {"tokenizer_class": "Words", "auto_map": ["own.Words", None]}},
    "another-repository": {
        "config": {"model_type": "stranger", "auto_map": {name: f"x/y--{ref}" for name, ref in MODEL_MAP.items()}}
    },
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_that_needs_its_code_is_refused(stranger, adapter, data, tmp_path, capsys, questions, name):
    folder = stranger(name, **CHANGES[name])
    capsys.readouterr()
    for run in (
        lambda: allocate(folder, data, tmp_path / "out"),
        lambda: compress(adapter, data, tmp_path / "out", "--keep", 0.5, "--model", folder),
    ):
        assert run() == 1
        line = error_line(capsys)
        assert f"{folder} needs Python code of its own (" in line
        assert "own.Words" in line or "own.Config" in line
        assert "--trust-remote-code" in line
    assert questions == []
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("task", PARTS)
def test_code_of_a_part_of_a_model_is_refused(stranger, data, tmp_path, capsys, questions, task):
    folder = with_own_part(stranger("nested"), task)
    labeled = write_jsonl(tmp_path / "labeled.jsonl", [{"text": text, "label": text} for text in texts(3)])
    capsys.readouterr()
    for options, message in (([], "which is not run"), (["--trust-remote-code"], "even with --trust-remote-code")):
        assert allocate(folder, labeled, tmp_path / "out", "--task", task, *options) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert "own.Model" in line
        assert message in line
    assert questions == []
    assert not (tmp_path / "ran").exists()


def test_code_of_the_base_that_an_adapter_names_is_refused(stranger, adapter, data, tmp_path, capsys, questions):
    folder = with_own_part(stranger("nested"), "causal-lm")
    moved = shutil.copytree(adapter, tmp_path / "moved")
    config = json.loads((moved / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(folder)}
    (moved / "adapter_config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert compress(moved, data, tmp_path / "out", "--keep", 0.5) == 1
    line = error_line(capsys)
    assert line.startswith(f"The base model that {moved} names")
    assert "own.Model" in line
    assert questions == []
    assert not (tmp_path / "ran").exists()


def test_code_of_the_tokenizer_of_an_adapter_is_refused(stranger, adapter, data, tmp_path, capsys, questions):
    folder = stranger("own-tokenizer", **CHANGES["own-tokenizer"])
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    (folder / "config.json").unlink()
    capsys.readouterr()
    assert compress(folder, data, tmp_path / "out", "--keep", 0.5) == 1
    assert f"{folder} needs Python code of its own (own.Words)" in error_line(capsys)
    assert questions == []
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {"auto_map": MODEL_MAP}},
        {"tokenizer_config": {"auto_map": TOKENIZER_MAP}},
        {"config": {"trust_remote_code": True, "auto_map": MODEL_MAP}},
    ],
    ids=["model", "tokenizer", "trust-in-the-file"],
)
def test_a_known_architecture_is_loaded_without_its_code(stranger, data, tmp_path, questions, changes):
    folder = stranger("known", **changes)
    (folder / "custom_generate").mkdir()
    (folder / "own.py").rename(folder / "custom_generate" / "generate.py")
    assert allocate(folder, data, tmp_path / "out") == 0
    assert questions == []
    assert not (tmp_path / "ran").exists()


def test_with_the_option_code_runs_and_is_named_before(stranger, data, tmp_path, capsys, questions):
    folder = stranger("allowed", **CHANGES["own-config"])
    capsys.readouterr()
    assert allocate(folder, data, tmp_path / "out", "--trust-remote-code", "--target-modules", "q_proj") == 0
    assert f"--trust-remote-code allows {folder} to run its Python code: own.Config, own.Model." in (
        capsys.readouterr().err
    )
    assert questions == []
    assert (tmp_path / "ran").exists()


def test_the_option_is_silent_about_a_model_without_code(llama, data, tmp_path, capsys):
    assert allocate(llama, data, tmp_path / "out", "--trust-remote-code") == 0
    assert capsys.readouterr().err == ""


def test_a_folder_with_a_script_of_a_dataset_does_not_run_it(llama, tmp_path, capsys, questions):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "corpus.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    write_jsonl(folder / "train.jsonl", [{"text": text} for text in texts(4)])
    allocate(llama, folder, tmp_path / "out")
    assert questions == []
    assert not (tmp_path / "ran").exists()


def test_the_setting_of_transformers_is_restored(llama, data, tmp_path):
    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    assert before > 0
    assert allocate(llama, data, tmp_path / "out") == 0
    assert before == dynamic_module_utils.TIME_OUT_REMOTE_CODE
