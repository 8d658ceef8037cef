"""Errors of the command: one line, and an exit code."""

import shutil
import subprocess
import sys

import datasets
import huggingface_hub
import pytest
import torch
from transformers import (
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import fim_lora
import fim_lora.cli.models
from fim_lora_command import main
from helpers.cli_inputs import allocate, compress, error_line, files, save_llama, texts, word_tokenizer, write_jsonl
from helpers.fork_server import run_in_fork


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--r-min", 9], "'--r-min': 9 is above -r 8"),
        (["--r-max", 7], "'--r-max': 7 is below -r 8"),
        (["--budget", "money"], "'--budget': 'money' is not one of rank, parameters"),
        (["--score", "sum"], "'--score': 'sum' is not one of norm, mean"),
        (["--task", "chess"], "'--task': 'chess' is not one of causal-lm, seq-cls"),
        (["--dtype", "int8"], "'--dtype': 'int8' is not one of auto, float32"),
        (["--device", "abacus"], "'--device': 'abacus' cannot be used"),
        (["--score-exponent", 0], "score_exponent must be positive"),
        (["--score-exponent", "nan"], "score_exponent must be positive"),
        (["-r", 0], "'-r' / '--rank': "),
        (["--batch-size", 0], "'--batch-size': "),
        (["--max-length", 1], "'--max-length': "),
        (["--column", "text"], "'--column': 'text' is not ROLE=NAME"),
        (["--column", "topic=x"], "'--column': 'topic' is not one of messages, prompt"),
        (["--column", "text=a", "--column", "text=b"], "'--column': text is given twice"),
        (["--target-modules", "(q_proj"], "'--target-modules': '(q_proj' is not a valid regular expression"),
        (["--target-modules", "q_proj,"], "'--target-modules': 'q_proj,' has an empty name"),
        (["--nonsense"], "No such option"),
    ],
)
def test_wrong_usage(tmp_path, capsys, options, message):
    # Neither the model nor the data exists: the options are checked first.
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
        ("missing/model", "no such file or folder. Give the path of a model, or the name of a model on the Hub"),
        ("missing.gguf", "no such file or folder"),
        ("empty", "is not a model: the folder has no config.json"),
        ("adapter", "is an adapter, not a model"),
        ("quantized", "give the GGUF file itself"),
        ("notes.txt", "is not a model: give a GGUF file"),
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
        ("quantized", "a.gguf", "x"),
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


def test_positions_of_roberta_begin_after_the_padding(tmp_path, capsys):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=60, max_position_embeddings=18, pad_token_id=1, **sizes)
    model = RobertaForSequenceClassification(config)
    model.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    model(input_ids=torch.full((1, 16), 5))
    with pytest.raises((IndexError, RuntimeError), match="index"):
        model(input_ids=torch.full((1, 17), 5))
    rows = [{"text": text, "label": label} for text, label in zip(texts(4, 20), "abab", strict=True)]
    path = write_jsonl(tmp_path / "long.jsonl", rows)
    capsys.readouterr()
    assert allocate(tmp_path / "model", path, tmp_path / "out", "--task", "seq-cls", "--max-length", 17) == 1
    assert "has 17 tokens, but the model has 16 positions: give --max-length 16" in capsys.readouterr().err
    assert allocate(tmp_path / "model", path, tmp_path / "out", "--task", "seq-cls", "--max-length", 16) == 0


@pytest.fixture
def unreachable(monkeypatch):
    """A Hub that does not answer, and a user who did not ask to work offline."""
    endpoint = "http://127.0.0.1:9"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    for settings in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(settings, "HF_HUB_OFFLINE", False)
    return endpoint


def test_names_without_a_hub(llama, data, adapter, unreachable, tmp_path, capsys):
    message = (
        "nothing cannot be loaded: there is no such file or folder, the cache of the Hub does not have it, and "
        f"{unreachable} cannot be reached"
    )
    for run in (
        lambda: allocate("nobody/nothing", data, tmp_path / "out"),
        lambda: allocate("nothing", data, tmp_path / "out"),
        lambda: allocate(llama, "nobody/nothing", tmp_path / "out"),
        lambda: compress("nobody/nothing", data, tmp_path / "out", "--keep", 0.5),
        lambda: compress(adapter, "nobody/nothing", tmp_path / "out", "--keep", 0.5),
        lambda: compress(adapter, data, tmp_path / "out", "--keep", 0.5, "--model", "nobody/nothing"),
        lambda: compress(adapter, data, tmp_path / "out", "--keep", 0.5, "--eval-data", "nobody/nothing"),
    ):
        assert run() == 1
        assert message in error_line(capsys)
        assert not huggingface_hub.constants.HF_HUB_OFFLINE
        assert not datasets.config.HF_HUB_OFFLINE


def test_a_model_in_the_cache_needs_no_hub(llama, data, unreachable, tmp_path, monkeypatch):
    cached = tmp_path / "hub" / "models--nobody--tiny"
    shutil.copytree(llama, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    # transformers 4 has a copy of the name.
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path / "hub"), raising=False)
    assert allocate("nobody/tiny", data, tmp_path / "out") == 0


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
    assert "no such file. Give the path of a data file, or the name of a dataset on the Hub" in error_line(capsys)
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


MISSING = {
    "a package of the extra": (
        "sys.modules['typer'] = None",
        "The command needs typer, which is not installed. In a clone of fim-lora: pip install '.[cli]'",
    ),
    "a package that another one needs": (
        "sys.modules['huggingface_hub.errors'] = None",
        "import of huggingface_hub.errors halted; None in sys.modules (imported by ",
    ),
    "a name that another version has": (
        "import accelerate.hooks as hooks; del hooks.remove_hook_from_submodules",
        "cannot import name 'remove_hook_from_submodules' from 'accelerate.hooks'",
    ),
}


@pytest.mark.parametrize("case", MISSING)
def test_an_import_that_fails_names_the_module_and_the_one_that_wanted_it(case):
    change, message = MISSING[case]
    code = f"import sys; {change}; import fim_lora_command; print(fim_lora_command.main(['show', 'x']))"
    status, output = run_in_fork(code, "torch", "transformers")
    *_, line, returned = output.splitlines()
    assert (status, returned) == (0, "1")
    assert line.startswith(f"fim-lora: error: {message}")
    assert ("pip install" in line) == (case == "a package of the extra")


def test_the_installed_command_tells_errors_by_its_exit_code(tmp_path):
    code = "import sys; from fim_lora_command import main; sys.exit(main())"
    result = subprocess.run(
        [sys.executable, "-c", code, "show", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
