"""Errors of `fim-lora compress`: one line and an exit code, before anything is written."""

import json
import shutil

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from fim_lora_command import main
from helpers.cli_inputs import (
    COMPRESSED_FILES,
    allocate,
    compress,
    error_line,
    files,
    save_adapter,
    save_llama,
    texts,
    write_jsonl,
)


def copied(adapter, folder, **changes):
    """A copy of an adapter with other values in its config."""
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def with_weights(adapter, folder, change):
    """A copy of an adapter with other weights: `change` gets them by name, and changes the dictionary."""
    shutil.copytree(adapter, folder)
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "x"], "'--keep': give exactly one of --keep, --rank and --max-loss-increase"),
        (["--data", "x", "--keep", 0.5, "--rank", 4], "'--keep': give exactly one of"),
        (["--data", "x", "--keep", 0], "'--keep': 0.0 is not a size"),
        (["--data", "x", "--keep", "nan"], "'--keep': Input should be less than or equal to 1"),
        (["--data", "x", "--keep", 1.5], "'--keep': Input should be less than or equal to 1"),
        (["--data", "x", "-r", 0], "'-r' / '--rank': Input should be greater"),
        (["--data", "x", "--max-loss-increase", 0.1], "'--max-loss-increase': the increase is measured"),
        (["--data", "x", "--max-loss-increase", "inf", "--eval-data", "x"], "inf is not a size"),
        (["--keep", 0.5], "'--data': give either --data or --without-data"),
        (["--data", "x", "--without-data", "--keep", 0.5], "'--data': give either"),
        (["--data", "x", "--keep", 0.5, "--task", "chess"], "'--task': 'chess' is not one of causal-lm, seq-cls"),
        (["--data", "x", "--keep", 0.5, "--dtype", "int8"], "'--dtype': 'int8' is not one of auto"),
        (["--data", "x", "--keep", 0.5, "--device", "abacus"], "'--device': 'abacus' cannot be used"),
        (["--data", "x", "--keep", 0.5, "--column", "text"], "'--column': 'text' is not ROLE=NAME"),
    ],
)
def test_wrong_usage(tmp_path, capsys, options, message):
    # The adapter does not exist: the options are checked first.
    arguments = ["compress", tmp_path / "adapter", "--output", tmp_path / "out", *options]
    assert main([str(word) for word in arguments]) == 2
    line = error_line(capsys)
    assert message in line
    assert line.endswith("(see fim-lora compress --help)")
    assert files(tmp_path) == []


def test_not_an_adapter(llama, data, adapter, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    shutil.copytree(adapter, tmp_path / "run" / "checkpoint-7")
    shutil.copytree(adapter, tmp_path / "pickled")
    (tmp_path / "pickled" / "adapter_model.safetensors").rename(tmp_path / "pickled" / "adapter_model.bin")
    assert allocate(llama, data, tmp_path / "untrained") == 0
    shutil.copytree(adapter, tmp_path / "broken")
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    shutil.copytree(adapter, tmp_path / "cut")
    content = (adapter / "adapter_model.safetensors").read_bytes()
    (tmp_path / "cut" / "adapter_model.safetensors").write_bytes(content[:-1])
    capsys.readouterr()
    for name, message in {
        tmp_path / "nope": "no such folder. Give a folder of save_pretrained with a trained LoRA adapter",
        "nobody/nothing": "nobody/nothing cannot be loaded: there is no such file or folder, the cache of the Hub",
        tmp_path / "notes.txt": "is not a folder. Give a folder of save_pretrained",
        tmp_path / "empty": "is not an adapter: it has no adapter_config.json",
        llama: "is a model, not an adapter",
        tmp_path / "run": f"give the folder of one adapter, such as {tmp_path / 'run' / 'checkpoint-7'}",
        tmp_path / "pickled": "a pickle file, which can hold code and is not read",
        tmp_path / "untrained": "has no adapter_model.safetensors: train the adapter first",
        tmp_path / "broken": "adapter_config.json cannot be read",
        tmp_path / "cut": "adapter_model.safetensors is not a safetensors file",
    }.items():
        assert compress(name, data, tmp_path / "out", "--keep", 0.5) == 1
        assert message in error_line(capsys), name
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
            "is not a LoRA config but IA3Config",
        ),
        (AdaLoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", total_step=9), "type ADALORA, not LoRA"),
        (LoraConfig(target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"), "variant of LoRA (DoRA)"),
        (
            LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM"),
            "was initialized with 'pissa', which changed the base",
        ),
        (LoraConfig(target_modules=["q_proj"], task_type="SEQ_2_SEQ_LM"), "has task_type 'SEQ_2_SEQ_LM'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_kinds_of_adapters(llama, data, tmp_path, capsys, config, message):
    task_type, config.task_type = config.task_type, "CAUSAL_LM"
    get_peft_model(LlamaForCausalLM.from_pretrained(llama), config).save_pretrained(tmp_path / "trained")
    trained = copied(tmp_path / "trained", tmp_path / "changed", task_type=task_type)
    capsys.readouterr()
    assert compress(trained, data, tmp_path / "out", "--keep", 0.5) == 1
    assert message in error_line(capsys)
    assert not (tmp_path / "out").exists()


def test_an_untrained_adapter(llama, data, tmp_path, capsys):
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(LlamaForCausalLM.from_pretrained(llama), config).save_pretrained(tmp_path / "trained")
    capsys.readouterr()
    for given, message in ((data, "gradient"), (None, "adds zero to every weight, as before its training")):
        options = [] if given else ["--without-data"]
        assert compress(tmp_path / "trained", given, tmp_path / "out", "--keep", 0.5, *options) == 1
        assert message in error_line(capsys)
    assert not (tmp_path / "out").exists()


def test_another_base_model(llama, data, tmp_path, capsys):
    adapter = save_adapter(llama, tmp_path / "trained", target_modules=["q_proj", "up_proj"])
    save_llama(tmp_path / "narrow", hidden_size=8)
    save_llama(tmp_path / "shallow", num_hidden_layers=1)
    save_llama(tmp_path / "deep", num_hidden_layers=3)
    capsys.readouterr()
    for name, message in {
        "narrow": "does not fit the base model: size mismatch for",
        "shallow": "does not fit the base model: the model has no place for the weights",
        "deep": "does not fit the base model: it lacks the weights",
    }.items():
        assert compress(adapter, data, tmp_path / "out", "--keep", 0.5, "--model", tmp_path / name) == 1
        line = error_line(capsys)
        assert message in line
        assert line.endswith("Give the model that the adapter was trained on as --model.")
    assert not (tmp_path / "out").exists()


def test_a_base_model_that_is_not_there(adapter, data, tmp_path, capsys):
    for name, message in {
        str(tmp_path / "gone"): "no such file or folder",
        "nobody/nothing": "nobody/nothing cannot be loaded",
    }.items():
        moved = copied(adapter, tmp_path / "moved", base_model_name_or_path=name)
        assert compress(moved, data, tmp_path / "out", "--keep", 0.5) == 1
        line = error_line(capsys)
        assert line.startswith(f"The base model that {moved} names (give another as --model): ")
        assert message in line
        shutil.rmtree(moved)
    moved = copied(adapter, tmp_path / "moved", base_model_name_or_path=None)
    assert compress(moved, data, tmp_path / "out", "--keep", 0.5) == 1
    assert error_line(capsys) == f"{moved} does not name its base model: give it as --model."


def test_weights_that_are_not_finite(adapter, data, tmp_path, capsys):
    def spoil(weights):
        next(iter(weights.values()))[0, 0] = torch.nan

    spoiled = with_weights(adapter, tmp_path / "trained", spoil)
    for given in (data, None):
        options = [] if given else ["--without-data"]
        assert compress(spoiled, given, tmp_path / "out", "--keep", 0.5, *options) == 1
        assert "has weights that are NaN or infinite, in model.layers.0" in error_line(capsys)


def test_a_head_that_is_nowhere(classifier, labeled, tmp_path, capsys):
    headless = with_weights(
        classifier,
        tmp_path / "trained",
        lambda weights: [weights.pop(name) for name in list(weights) if "classifier" in name],
    )
    options = ["--keep", 0.5, "--column", "text=sentence"]
    # The number of classes is then that of the base model, 2 by default.
    assert compress(headless, labeled, tmp_path / "out", *options) == 1
    assert "has 3 different labels, but the adapter's head has 2 outputs" in error_line(capsys)
    two = write_jsonl(tmp_path / "two.jsonl", [{"text": text, "label": n % 2} for n, text in enumerate(texts(4))])
    assert compress(headless, two, tmp_path / "out", "--keep", 0.5) == 1
    assert "has the weights classifier.bias, classifier.weight: give the model" in error_line(capsys)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "b"], "has 2 different labels, but the adapter's head has 3 outputs, so it is not known which"),
        (["a", "b", "c", "d"], "has 4 different labels"),
        ([0, 3], "has the labels 0 to 3, but the adapter's head has 3 outputs, 0 to 2"),
        ([-1, 1], "has the labels -1 to 1"),
        ([0.5, 1.5], "labels must be strings or integers"),
    ],
)
def test_labels_that_are_not_those_of_the_head(classifier, tmp_path, capsys, labels, message):
    rows = [{"text": text, "label": label} for text, label in zip(texts(4), (labels * 2)[:4], strict=True)]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    assert compress(classifier, data, tmp_path / "out", "--keep", 0.5) == 1
    assert message in error_line(capsys)


def test_evaluation_labels_that_the_data_does_not_have(classifier, labeled, tmp_path, capsys):
    rows = [{"sentence": text, "label": label} for text, label in zip(texts(4), "abbd", strict=True)]
    held_out = write_jsonl(tmp_path / "held_out.jsonl", rows)
    options = ["--keep", 0.5, "--column", "text=sentence", "--eval-data", held_out]
    assert compress(classifier, labeled, tmp_path / "out", *options) == 1
    assert "The label 'd' of row 4" in error_line(capsys)


def test_a_task_that_the_adapter_does_not_have(adapter, data, tmp_path, capsys):
    assert compress(adapter, data, tmp_path / "out", "--keep", 0.5, "--task", "seq-cls") == 1
    assert "has task_type 'CAUSAL_LM': leave --task out" in error_line(capsys)


def test_a_size_that_cannot_be_reached(adapter, data, tmp_path, capsys):
    assert compress(adapter, data, tmp_path / "out", "--keep", 1e-6) == 1
    assert "leaves no room for a single component" in error_line(capsys)
    assert not (tmp_path / "out").exists()


def test_the_adapter_itself_is_not_replaced(adapter, data, capsys):
    before = {path: path.read_bytes() for path in adapter.iterdir()}
    assert compress(adapter, data, adapter.parent / "." / adapter.name, "--keep", 0.5, "--overwrite") == 1
    assert "is the adapter itself, which would be lost: give another --output" in error_line(capsys)
    assert {path: path.read_bytes() for path in adapter.iterdir()} == before


def test_settings_of_a_newer_peft_are_told(adapter, data, tmp_path, capsys):
    newer = copied(adapter, tmp_path / "trained", use_wonder=True)
    assert compress(newer, data, tmp_path / "out", "--keep", 0.5) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("fim-lora: warning: ")
    assert "has settings that this version of PEFT does not know and ignores: use_wonder." in line


def test_an_output_folder_with_something_in_it(adapter, data, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine")
    assert compress(tmp_path / "no-adapter", data, out, "--keep", 0.5) == 1
    assert "--overwrite" in error_line(capsys)
    assert compress(adapter, data, out, "--keep", 0.5, "--overwrite") == 0
    assert (out / "README.md").read_text() == "mine"


@pytest.mark.parametrize("name", COMPRESSED_FILES)
def test_a_folder_in_the_place_of_a_file_is_refused_before_anything_is_loaded(data, tmp_path, capsys, name):
    out = tmp_path / "out"
    (out / name).mkdir(parents=True)
    assert compress(tmp_path / "no-adapter", data, out, "--keep", 0.5, "--overwrite") == 1
    message = error_line(capsys)
    assert f"{out / name} is a folder" in message
    assert "--output" in message
    assert files(out) == [name]


def test_the_result_can_be_read_as_far_as_the_umask_allows(adapter, data, tmp_path):
    assert compress(adapter, data, tmp_path / "out", "--keep", 0.5) == 0
    (tmp_path / "plain.txt").write_text("")
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "plain.txt").stat().st_mode}


def test_a_modules_to_save_adapter_without_its_weights(llama, data, tmp_path, capsys):
    trained = save_adapter(llama, tmp_path / "full", modules_to_save=["embed_tokens"], target_modules=["q_proj"])
    lacking = with_weights(
        trained, tmp_path / "trained", lambda weights: weights.pop("base_model.model.model.embed_tokens.weight")
    )
    capsys.readouterr()
    assert compress(lacking, data, tmp_path / "out", "--keep", 0.5) == 1
    assert "it lacks the weights base_model.model.model.embed_tokens.weight" in error_line(capsys)
