"""Mistakes that are easy to make at the command line, and what the command answers."""

import http.server
import shutil
import threading
from pathlib import Path

import huggingface_hub
import pytest
from transformers import BertConfig, BertForMaskedLM, LlamaModel

from fim_lora_command import main
from helpers.cli_inputs import OUR_FILES, allocate, compress, error_line, files, word_tokenizer


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama/model.safetensors", "is one file of a model: give its folder, {folder}/llama."),
        ("llama/config.json", "is one file of a model: give its folder, {folder}/llama."),
        ("model.safetensors", "holds only weights: give a folder of save_pretrained"),
    ],
)
def test_a_file_of_a_model_instead_of_its_folder(llama, data, tmp_path, capsys, name, message):
    shutil.copytree(llama, tmp_path / "llama")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert allocate(tmp_path / name, data, tmp_path / "out") == 1
    assert message.format(folder=tmp_path) in error_line(capsys)


def test_a_file_of_an_adapter_instead_of_its_folder(adapter, data, tmp_path, capsys):
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert compress(adapter / file, data, tmp_path / "out", "--keep", 0.5) == 1
        assert error_line(capsys) == f"{adapter / file} is one file of an adapter: give its folder, {adapter}."


def test_the_file_of_the_ranks_is_as_good_as_its_folder(allocated, capsys):
    folder = allocated / "plain"
    for command in (["show"], ["export", "--format", "csv"]):
        printed = []
        for path in (folder, folder / "fim_allocation.json"):
            assert main([*command, str(path)]) == 0
            printed.append(capsys.readouterr().out)
        assert printed[0] == printed[1] != ""
    assert files(folder) == OUR_FILES


def test_another_file_of_a_result_names_the_folder(allocated, llama, capsys):
    path = allocated / "plain" / "rank_map.png"
    assert main(["show", str(path)]) == 1
    assert f"{path} is a file: give its folder, {path.parent}, which" in error_line(capsys)
    assert main(["show", str(llama / "config.json")]) == 1
    assert "is a file: give a folder, which fim-lora allocate or fim-lora" in error_line(capsys)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("export x --format csv --serving", "'--serving': it has no effect on a table of ranks"),
        ("export x --format peft --overwrite", "'--overwrite': it has no effect without --output"),
        ("compress x --output y --without-data --batches 2 --keep 0.5", "'--batches': it has no effect with"),
        ("compress x --output y --data z --eval-batches 2 --keep 0.5", "'--eval-batches': it has no effect without"),
    ],
)
def test_an_option_without_effect(capsys, command, message):
    assert main(command.split()) == 2
    assert message in error_line(capsys)


def test_a_home_folder_after_an_equals_sign(llama, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama, tmp_path / "llama")
    shutil.copy(data, tmp_path / "data.jsonl")
    sizes = ["--batches=2", "--batch-size=2"]
    assert main(["allocate", "--model=~/llama", "--data=~/data.jsonl", "--output=~/out", *sizes]) == 0
    assert files(tmp_path / "out") == OUR_FILES
    assert main(["export", "~/out", "--format=csv", "--output=~/ranks.csv"]) == 0
    assert (tmp_path / "ranks.csv").is_file()
    assert not Path("~").exists()
    capsys.readouterr()
    assert main(["show", "~nobody-has-this-name/out"]) == 1
    assert "~nobody-has-this-name/out" in error_line(capsys)


def test_no_target_lists_the_linear_layers_nearest_to_it(llama, data, tmp_path, capsys):
    for targets in ("qproj", ".*qproj"):
        assert allocate(llama, data, tmp_path / "out", "--target-modules", targets) == 1
        line = error_line(capsys)
        assert targets in line
        assert "Linear layers of the model are 'q_proj', " in line


def test_an_encoder_is_not_taken_for_a_causal_model(bert, data, labeled, tmp_path, capsys):
    assert allocate(bert, data, tmp_path / "out") == 1
    line = error_line(capsys)
    assert f"{bert} is an encoder (bert), not a causal language model: give --task seq-cls" in line
    assert not (tmp_path / "out").exists()
    # With a head for masked tokens no weight is missing, but every token sees the one that it predicts.
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(vocab_size=60, **sizes)).save_pretrained(tmp_path / "masked")
    word_tokenizer().save_pretrained(tmp_path / "masked")
    capsys.readouterr()
    assert allocate(tmp_path / "masked", data, tmp_path / "out") == 1
    assert "is an encoder (bert)" in error_line(capsys)
    # A new head for classes is normal.
    options = ["--task", "seq-cls", "--column", "text=sentence", "--max-length", 16]
    assert allocate(bert, labeled, tmp_path / "out", *options) == 0
    assert "start at random values: classifier." in capsys.readouterr().err


def test_a_causal_model_without_its_head_is_refused(llama, data, tmp_path, capsys):
    LlamaModel.from_pretrained(llama).save_pretrained(tmp_path / "headless")
    word_tokenizer().save_pretrained(tmp_path / "headless")
    capsys.readouterr()
    assert allocate(tmp_path / "headless", data, tmp_path / "out") == 1
    line = error_line(capsys)
    assert "lacks 1 weights of a causal language model" in line
    assert "random values: lm_head.weight" in line
    assert not (tmp_path / "out").exists()


@pytest.fixture
def gateway(monkeypatch):
    """A server that answers in place of the Hub, as a gateway without a connection does; it counts the requests."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            requests.append(self.path)
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield endpoint, requests
    server.shutdown()


def test_a_gateway_that_cannot_reach_the_hub_is_asked_once(gateway, data, tmp_path, capsys):
    endpoint, requests = gateway
    assert allocate("nobody/nothing", data, tmp_path / "out") == 1
    assert f"{endpoint} cannot be reached (status 503). Correct the name, check the network, or" in error_line(capsys)
    assert len(requests) == 1
