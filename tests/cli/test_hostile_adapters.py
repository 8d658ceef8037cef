"""`fim-lora compress` with an adapter from a stranger ends quickly, in one line, and runs nothing that a file names.

The commands run in a separate process with a limit of memory, so that a file cannot use up that of the computer.
"""

import json
import os
import shutil
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fim_lora.cli.adapter_source import AdapterSource, find_adapter
from fim_lora_command.errors import CommandError
from helpers.commands import run_commands

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def require_one_line(command, result):
    code, out, err = result
    assert (code, out) == (1, ""), (command, result)
    [line] = err.splitlines()
    assert line.startswith("fim-lora: error: ")
    assert line.isprintable()
    assert len(line) < 1000
    assert "Unexpected" not in line, (command, line)
    return line


def snapshot(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and not path.is_symlink()}


def compress(folder, data, out):
    return ("compress", folder, "--data", data, "--keep", "0.5", "--batches", "2", "--output", out)


@pytest.fixture
def attack(adapter, tmp_path):
    """Makes a copy of the adapter, and spoils it."""

    def make(name, spoil):
        folder = shutil.copytree(adapter, tmp_path / name)
        spoil(folder)
        return folder

    return make


def changed(**changes):
    def spoil(folder):
        content = json.loads((folder / CONFIG).read_text()) | changes
        (folder / CONFIG).write_text(json.dumps(content))

    return spoil


def text(content, file=CONFIG):
    return lambda folder: (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def replaced(file, make):
    def spoil(folder):
        (folder / file).unlink()
        make(folder / file)

    return spoil


DEEP = "[" * 200_000
CONFIGS = {
    "deep": text(DEEP),
    "deep-target": text('{"peft_type": "LORA", "target_modules": ' + DEEP),
    "empty": text(""),
    "binary": text(bytes(range(256))),
    "list": text("[]"),
    "pipe": replaced(CONFIG, os.mkfifo),
    "device": replaced(CONFIG, lambda path: path.symlink_to("/dev/zero")),
    "folder": replaced(CONFIG, lambda path: path.mkdir()),
    "terminal": changed(peft_type="\x1b[2J"),
    "unknown-type": changed(peft_type="../../x"),
    "no-type": changed(peft_type=None),
    "huge-rank": changed(r=10**9),
    "larger-rank": changed(r=10**400),
    "negative-rank": changed(r=-4),
    "word-as-rank": changed(r="many"),
    "huge-rank-pattern": changed(rank_pattern={"q_proj": 10**9}),
    "list-as-pattern": changed(rank_pattern=["q_proj"]),
    "no-pattern": changed(rank_pattern={"(": 3}),
    "word-as-alpha": changed(lora_alpha="much"),
    "no-alpha": changed(lora_alpha=None),
    "no-number-as-alpha": changed(lora_alpha=float("nan")),
    "number-as-targets": changed(target_modules=5),
    "no-targets": changed(target_modules=[]),
    "broken-targets": changed(target_modules="(q_proj"),
    "number-as-modules": changed(modules_to_save=5),
    "code-as-module": changed(megatron_config={"x": 1}, megatron_core="os"),
    "number-as-base": changed(base_model_name_or_path=5),
    "terminal-as-base": changed(base_model_name_or_path="\x1b[2J"),
    "device-as-base": changed(base_model_name_or_path="/dev/zero"),
    "climbing-base": changed(base_model_name_or_path="../../../../../../etc"),
    "list-as-task": changed(task_type=["CAUSAL_LM"]),
    "terminal-as-task": changed(task_type="\x1b[2J"),
    "number-as-tokens": changed(trainable_token_indices=[10**9]),
    "huge-replication": changed(layer_replication=[[0, 10**9]]),
    "word-as-bias": changed(bias="\x1b[2J"),
    "another-initialization": changed(init_lora_weights="loftq"),
    "list-as-dropout": changed(lora_dropout=[1]),
}
OTHER_WEIGHTS = {
    "no-header": text(b"", WEIGHTS),
    "pickle": text(b"\x80\x04cos\nsystem\n.", WEIGHTS),
    "huge-header": text(struct.pack("<Q", 2**62) + b"{}", WEIGHTS),
    "bad-header": text(struct.pack("<Q", 2) + b"{]", WEIGHTS),
    "outside": text(
        struct.pack("<Q", 64) + b'{"a":{"dtype":"F32","shape":[9,9],"data_offsets":[0,324]}}'.ljust(64), WEIGHTS
    ),
    "no-tensors": text(struct.pack("<Q", 2) + b"{}", WEIGHTS),
    "weights-pipe": replaced(WEIGHTS, os.mkfifo),
    "weights-device": replaced(WEIGHTS, lambda path: path.symlink_to("/dev/zero")),
    "weights-folder": replaced(WEIGHTS, lambda path: path.mkdir()),
}


def with_tensors(change):
    def spoil(folder):
        tensors = load_file(folder / WEIGHTS)
        first = next(iter(tensors))
        change(tensors, first)
        save_file(tensors, folder / WEIGHTS)

    return spoil


TENSORS = {
    "terminal-name": with_tensors(lambda tensors, first: tensors.update({"\x1b[2J" * 90: torch.zeros(1)})),
    "evil-name": with_tensors(lambda tensors, first: tensors.update({"(a+)+$": torch.zeros(1)})),
    "empty-tensor": with_tensors(lambda tensors, first: tensors.update({first: torch.zeros(0, 16)})),
    "integers": with_tensors(lambda tensors, first: tensors.update({first: tensors[first].long()})),
    "one-dimension": with_tensors(lambda tensors, first: tensors.update({first: torch.zeros(4)})),
    "infinite": with_tensors(lambda tensors, first: tensors.update({first: tensors[first] / 0})),
    "lacking": with_tensors(lambda tensors, first: tensors.pop(first)),
}


@pytest.mark.parametrize("attacks", [CONFIGS, OTHER_WEIGHTS, TENSORS], ids=["config", "weights", "tensors"])
def test_hostile_adapters_end_in_one_line(attacks, attack, data, tmp_path):
    folders = [attack(name, spoil) for name, spoil in attacks.items()]
    (tmp_path / "elsewhere").mkdir()
    before = snapshot(tmp_path)
    commands = [compress(folder, data, tmp_path / "out") for folder in folders]
    results = run_commands(commands, tmp_path / "elsewhere", memory=16 * 2**30)
    assert len(results) == len(commands)
    for folder, result in zip(folders, results, strict=True):
        require_one_line(folder.name, result)
    assert snapshot(tmp_path) == before


def test_hostile_names_in_the_config_are_only_names(attack, data, tmp_path):
    folder = attack(
        "named", changed(auto_mapping={"base_model_class": "system", "parent_library": "os"}, revision="x")
    )
    [[code, out, err]] = run_commands([compress(folder, data, tmp_path / "out")], tmp_path)
    assert (code, err) == (0, "")
    assert all(line.isprintable() for line in out.splitlines())


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.integers() | st.text(max_size=5), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
    st.sampled_from([10**400, "\x1b[2J", "../../x", "SEQ_CLS", "pissa", "(a+)+$"]),
)


@pytest.mark.filterwarnings("ignore")  # of PEFT, about the values
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_value_in_the_config_is_read_or_refused(adapter, tmp_path, capsys, data):
    folder = tmp_path / "trained"
    if not folder.exists():
        shutil.copytree(adapter, folder)
    content = json.loads((adapter / CONFIG).read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        content[data.draw(st.sampled_from(sorted(content)) | st.text(max_size=9))] = data.draw(VALUES)
    (folder / CONFIG).write_text(json.dumps(content))
    require_source_or_error(folder)


@pytest.mark.filterwarnings("ignore")  # of PEFT, about the values
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_changed_bytes_of_the_weights_are_read_or_refused(adapter, tmp_path, capsys, data):
    folder = tmp_path / "trained"
    if not folder.exists():
        shutil.copytree(adapter, folder)
    content = bytearray((adapter / WEIGHTS).read_bytes())
    for position in data.draw(st.lists(st.integers(0, 3000), min_size=1, max_size=4)):
        content[position] = data.draw(st.integers(0, 255) | st.sampled_from(b'0123456789-"[]{},:'))
    end = data.draw(st.none() | st.integers(0, len(content)))
    (folder / WEIGHTS).write_bytes(content[:end])
    require_source_or_error(folder)


def require_source_or_error(folder):
    try:
        source = find_adapter(str(folder))
    except CommandError:
        return
    assert isinstance(source, AdapterSource)
    assert source.shapes.keys() == source.dtypes.keys()
    assert source.num_classes is None or source.num_classes >= 0
