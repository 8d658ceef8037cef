"""The output folder of `fim-lora allocate`: what stays in it, also when a run is interrupted."""

import os
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

import fim_lora
import fim_lora.cli.output
from helpers.cli_inputs import OUR_FILES, allocate, error_line, files


def test_a_folder_with_something_in_it_needs_overwrite(llama, data, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "rank_map.png").write_text("old")
    # The error is raised before the model is searched for.
    assert allocate(tmp_path / "no-model", data, out) == 1
    assert "--overwrite" in error_line(capsys)
    assert allocate(llama, data, out, "--overwrite") == 0
    assert files(out) == sorted([*OUR_FILES, "notes.txt"])
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "rank_map.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_of_another_command_is_refused_even_with_overwrite(llama, data, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "fim_compression.json").write_text("{}")
    assert allocate(llama, data, out, "--overwrite") == 1
    assert "fim_compression.json" in error_line(capsys)
    assert files(out) == ["fim_compression.json"]


@pytest.mark.parametrize("name", OUR_FILES)
def test_a_folder_in_the_place_of_a_file_is_refused_before_the_model_is_searched_for(data, tmp_path, capsys, name):
    out = tmp_path / "out"
    (out / name).mkdir(parents=True)
    assert allocate(tmp_path / "no-model", data, out, "--overwrite") == 1
    message = error_line(capsys)
    assert f"{out / name} is a folder" in message
    assert "--output" in message
    assert files(out) == [name]


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
    assert "is not a folder" in error_line(capsys)
    assert allocate(llama, data, tmp_path / "out" / "below") == 1
    assert "cannot be created" in error_line(capsys)


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
    ("place", "name"), [(LlamaForCausalLM, "forward"), (fim_lora.cli.output, "draw_rank_map")], ids=["run", "write"]
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


@pytest.mark.parametrize("error", [OSError(28, "No space left on device", "somewhere"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing", OUR_FILES)
def test_a_move_that_fails_leaves_the_previous_files(llama, data, tmp_path, monkeypatch, failing, error):
    out = tmp_path / "out"
    out.mkdir()
    previous = {name: f"previous {name}" for name in ("adapter_config.json", "rank_map.png", "notes.txt")}
    for name, text in previous.items():
        (out / name).write_text(text)
    replace = Path.replace

    def fail_at_one(path, target):
        if Path(target) == out / failing and path.parent.name == "files":
            raise error
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fail_at_one)
    assert allocate(llama, data, out, "--overwrite") == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert {path.name: path.read_text() for path in out.iterdir()} == previous


def test_a_full_disk_leaves_no_trace(llama, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fim_lora.cli.output, "draw_rank_map", _fail)
    assert allocate(llama, data, tmp_path / "out") == 1
    assert error_line(capsys) == "somewhere: No space left on device"
    assert files(tmp_path) == []
