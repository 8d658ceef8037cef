"""Untrusted files: damaged, from a future version, or malicious.

Whatever their content, reading them ends quickly, in an `InvalidFileError` or in a usable object, and nothing outside
of the folder is touched. The command runs in a separate process. Its time limit is not a measurement: it only turns an
endless run into a failed test.
"""

import contextlib
import copy
import csv
import io
import json
import math
import os
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from fim_lora import FimConfig, FimScores, LayerScore, RankAllocation
from fim_lora.report.exports import export
from fim_lora.report.rank_map import draw_rank_map
from fim_lora.runtime.checked_json import InvalidFileError
from helpers.commands import run_commands
from helpers.damaged_json import HOSTILE_NAMES, truncated, with_changed_bytes, with_changed_values

LAYERS = ["encoder.layers.0.q_proj", "encoder.layers.0.v_proj", "encoder.layers.1.q_proj", "head"]


def scores():
    return FimScores({name: LayerScore(2.0**-place, 0.1, 8, (12, 20)) for place, name in enumerate(LAYERS)}, 2)


def config():
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj", "head"], task_type="CAUSAL_LM")


def allocation():
    return RankAllocation.from_scores(scores(), config())


def written(directory, value):
    path = directory / "file.json"
    value.save(path)
    return path.read_text()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    directory = tmp_path_factory.mktemp("good")
    return {RankAllocation: written(directory, allocation()), FimScores: written(directory, scores())}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


def is_integer(value, at_least):
    return type(value) is int and at_least <= value <= 2**53


def require_sound(value):
    """Checks the properties that any reader of the object may rely on."""
    measured = value.scores if isinstance(value, RankAllocation) else value
    assert is_integer(measured.num_batches, 0)
    for name, score in measured.items():
        assert name
        assert name.isprintable()
        assert 0 <= score.mean < math.inf
        sizes = (*score.shape, score.parameters_per_rank, score.rank_step, score.num_entries)
        assert all(is_integer(size, 1) for size in sizes)
    if isinstance(value, FimScores):
        return
    assert set(value.ranks) == set(value.alphas) == set(measured) != set()
    assert all(is_integer(rank, 0) for rank in value.ranks.values())
    assert all(math.isfinite(alpha) for alpha in value.alphas.values())
    assert type(value.use_rslora) is bool
    assert is_integer(value.r, 1)
    assert is_integer(value.budget, 0)
    assert is_integer(value.budget_used, 0)
    assert str(value)
    require_no_formula_in_the_table(value)


FORMULA_STARTS = ("=", "+", "-", "@")


def require_no_formula_in_the_table(value):
    """A spreadsheet evaluates cells that start like a formula."""
    if any(name.startswith(FORMULA_STARTS) for name in value.ranks):
        with pytest.raises(ValueError, match="would evaluate the layer name"):
            export(value, LoraConfig(), "csv")
        return
    rows = csv.reader(io.StringIO(export(value, LoraConfig(), "csv")))
    assert not any(row[0].startswith(FORMULA_STARTS) for row in rows)


def require_error_or_sound_object(kind, data, place):
    path = place / "file.json"
    path.write_bytes(data)
    try:
        value = kind.load(path)
    except InvalidFileError:
        return
    require_sound(value)
    value.save(path)
    assert kind.load(path) == value
    if isinstance(value, RankAllocation):
        base = LoraConfig(r=value.r, lora_alpha=value.lora_alpha, use_rslora=value.use_rslora, target_modules=LAYERS)
        for serving in (False, True):
            with contextlib.suppress(ValueError):
                value.to_lora_config(base, serving=serving)


KINDS = pytest.mark.parametrize("kind", [RankAllocation, FimScores])
THOROUGH = settings(max_examples=150, deadline=None)


@KINDS
@THOROUGH
@given(st.data())
def test_truncated_files(kind, texts, place, data):
    (place / "file.json").write_bytes(truncated(texts[kind], data))
    with pytest.raises(InvalidFileError):
        kind.load(place / "file.json")


@KINDS
@THOROUGH
@given(st.data())
def test_changed_bytes(kind, texts, place, data):
    require_error_or_sound_object(kind, with_changed_bytes(texts[kind], data), place)


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


HOSTILE_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.sampled_from([10**400, -(10**400), 1e308, -1.5, 5e-324, 0, "1", "NaN", [], {}, [[]], {"": 0}, nested(500)]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(string.printable, max_size=20),
    st.sampled_from(HOSTILE_NAMES),
)


@KINDS
@settings(max_examples=400, deadline=None)
@given(st.data())
def test_changed_values_and_names(kind, texts, place, data):
    damaged = with_changed_values(texts[kind], data, HOSTILE_VALUES)
    require_error_or_sound_object(kind, damaged, place)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_same_hostile_name_everywhere(texts, place, data):
    old = data.draw(st.sampled_from(LAYERS))
    new = data.draw(st.sampled_from(HOSTILE_NAMES) | st.text(max_size=30))
    text = texts[RankAllocation].replace(json.dumps(old), json.dumps(new))
    require_error_or_sound_object(RankAllocation, text.encode("utf-8", "surrogatepass"), place)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"r": 4', '"r": 1e999', "inf"),
        ('"r": 4', '"r": NaN', "NaN is not a JSON number"),
        ('"r": 4', '"r": 4.0', "4.0 is not an integer"),
        ('"r": 4', '"r": true', "True is not an integer"),
        ('"r": 4', '"r": 0', "0 is not between 1 and"),
        ('"r": 4', f'"r": {10**400}', "is not between 1 and"),
        ('"r": 4', f'"r": 1{"0" * 5000}', "not a JSON file"),
        ('"r": 4', '"r": 4, "r": 4', "a key appears twice"),
        ('"use_rslora": false', '"use_rslora": "false"', "neither true nor false"),
        ('"schema_version": 1', '"schema_version": 2', "schema_version 2, but this fim-lora reads up to 1: upgrade"),
        ('"schema_version": 1', f'"schema_version": {10**400}', "upgrade fim-lora"),
        ('"provenance": {}', f'"provenance": {"[" * 100_000}{"]" * 100_000}', "not a JSON file"),
        ('"head"', '"\\u001b[2J"', "is not the name of a layer"),
        ('"head"', '"\\ud800"', "is not the name of a layer"),
    ],
)
def test_what_the_error_says(texts, tmp_path, old, new, message):
    text = texts[RankAllocation]
    assert old in text
    path = tmp_path / "fim_allocation.json"
    path.write_text(text.replace(old, new))
    with pytest.raises(InvalidFileError, match=message):
        RankAllocation.load(path)


# --- The command ---


def renamed(names):
    """An allocation of layers with other names."""
    given = {name: LayerScore(1.0 + place, 0.1, 8, (12, 20)) for place, name in enumerate(names)}
    return RankAllocation.from_scores(FimScores(given, 2), config())


def write_folder(folder, value=None):
    folder.mkdir()
    value = value or allocation()
    value.to_lora_config(config()).save_pretrained(folder)
    value.save(folder / "fim_allocation.json")
    return folder


def change_adapter_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def snapshot(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and not path.is_symlink()}


def test_names_that_a_spreadsheet_would_evaluate_are_in_no_table(tmp_path):
    names, commands = [f"{start}HYPERLINK(1)" for start in FORMULA_STARTS], []
    for place, name in enumerate(names):
        folder = write_folder(tmp_path / str(place), renamed([name, "layers.0.a"]))
        commands += [("show", folder), *(("export", folder, "--format", kind) for kind in ("axolotl", "peft"))]
        commands += [("export", folder, "--format", "csv", "--output", folder / "ranks.csv")]
    results = run_commands(commands, tmp_path)
    for place, name in enumerate(names):
        *others, (code, out, err) = results[4 * place : 4 * place + 4]
        assert [(code, err) for code, _, err in others] == [(0, "")] * 3
        assert (code, out) == (1, "")
        assert f"would evaluate the layer name {name!r} as a formula: export to another format" in err
        assert not (tmp_path / str(place) / "ranks.csv").exists()


EVIL = "(a+)+$"
EVIL_NAME = "layers.0." + "a" * 60 + "!"


def test_strange_names_are_only_names(tmp_path):
    names = {
        "outside": ["../../outside", "/outside", "..\\outside"],
        "expressions": [EVIL, EVIL_NAME, ".*", "(?P<x>", "[", "layers.00.a", "layers.0.a"],
        "formulas": ["layers.0.$\\frac$", "layers.0.$x$", "${x}", "layers.0.[bold]", "layers.0.%n{x}"],
        "depths": [f"layers.{'9' * 500}.a", "layers.١.a", "layers.0.a"],
        "a long line": [f"layers{place}" for place in range(200)],
        "a diagonal": [f"layers.{place}.proj{place}" for place in range(60)],
        "long": [f"layers.{place}.{'a' * 900}" for place in range(3)],
    }
    folders = [write_folder(tmp_path / kind, renamed(layers)) for kind, layers in names.items()]
    before = snapshot(tmp_path)
    formats = ("csv", "axolotl", "peft")
    commands = [("show", folder) for folder in folders]
    commands += [("export", folder, "--format", name) for folder in folders for name in formats]
    commands += [("compare", folder, folder, "--output", folder / "ranks.png") for folder in folders]
    results = run_commands(commands, tmp_path)
    assert len(results) == len(commands)
    for command, (code, out, err) in zip(commands, results, strict=True):
        assert (code, err) == (0, ""), command
        assert all(line.isprintable() for line in out.splitlines())
    for folder in folders:
        draw_rank_map(RankAllocation.load(folder / "fim_allocation.json"), folder / "rank_map.png")
    drawn = {folder / name for folder in folders for name in ("rank_map.png", "ranks.png")}
    after = snapshot(tmp_path)
    assert set(after) - set(before) == drawn
    assert all(after[path] == content for path, content in before.items())
    assert [path for path in tmp_path.parent.iterdir() if "outside" in path.name] == []


def test_hostile_folders_end_in_one_line(tmp_path):
    rank_pattern = allocation().rank_pattern
    commands = []

    def attack(name, spoil, *command):
        folder = write_folder(tmp_path / name)
        spoil(folder)
        commands.extend([(*command, folder)] if command else [("show", folder), ("export", folder, "--format", "csv")])

    def replaced_by_pipe(folder):
        (folder / "fim_allocation.json").unlink()
        os.mkfifo(folder / "fim_allocation.json")

    def replaced_by_device(folder):
        (folder / "fim_allocation.json").unlink()
        (folder / "fim_allocation.json").symlink_to("/dev/zero")

    def replaced_by_folder(folder):
        (folder / "fim_allocation.json").unlink()
        (folder / "fim_allocation.json").mkdir()

    def text(content, file="fim_allocation.json"):
        return lambda folder: (folder / file).write_text(content)

    export = ("export", "--format", "peft")
    deep = "[" * 200_000
    attack("pipe", replaced_by_pipe)
    attack("device", replaced_by_device)
    attack("folder", replaced_by_folder)
    attack("deep", text(deep))
    attack("empty", text(""))
    attack("binary", lambda folder: (folder / "fim_allocation.json").write_bytes(bytes(range(256))))
    attack("pickle", lambda folder: (folder / "fim_allocation.json").write_bytes(b"\x80\x04cos\nsystem\n."))
    attack("deep-config", text(deep, "adapter_config.json"), *export)
    attack("deep-target", text('{"peft_type": "LORA", "target_modules": ' + deep, "adapter_config.json"), *export)
    for name, changes in {
        "evil": {"rank_pattern": {EVIL: 3} | rank_pattern},
        "huge": {"r": 10**400},
        "terminal": {"peft_type": "\x1b[2J"},
        "unknown-type": {"peft_type": "../../x"},
        "swapped": {"alpha_pattern": {"head": 1e308}},
        "no-mapping": {"rank_pattern": ["head"]},
    }.items():
        attack(name, lambda folder, changes=changes: change_adapter_config(folder, **changes), *export)
    # The evil key would be matched against this name.
    folder = write_folder(tmp_path / "evil-name", renamed([EVIL_NAME, "head"]))
    change_adapter_config(folder, rank_pattern={EVIL: 3})
    commands.append((*export, folder))

    before = snapshot(tmp_path)
    results = run_commands(commands, tmp_path)
    assert len(results) == len(commands)
    for command, (code, out, err) in zip(commands, results, strict=True):
        assert (code, out) == (1, ""), (command, code, out, err)
        [line] = err.splitlines()
        assert line.startswith("fim-lora: error: ")
        assert line.isprintable()
        assert len(line) < 1000
        assert "Unexpected" not in line, line
    assert snapshot(tmp_path) == before


def test_hostile_targets_of_the_adapter_config_are_not_tried(tmp_path):
    # The values are kept unchanged for PEFT and for readers. Nothing is matched, imported or loaded here.
    folder = write_folder(tmp_path / "out", renamed([EVIL_NAME, "head"]))
    hostile = {"base_model_class": "system", "parent_library": "os"}
    change_adapter_config(folder, target_modules=EVIL, auto_mapping=hostile, base_model_name_or_path="../../x")
    before = snapshot(tmp_path)
    [[code, out, err]] = run_commands([("export", folder, "--format", "peft")], tmp_path)
    assert (code, err) == (0, "")
    assert json.loads(out)["target_modules"] == EVIL
    assert snapshot(tmp_path) == before


def test_a_table_too_large_to_show_can_be_exported(tmp_path):
    folder = write_folder(tmp_path / "out", renamed([f"layers.{place}.proj{place}" for place in range(450)]))
    [shown, exported] = run_commands([("show", folder), ("export", folder, "--format", "csv")], tmp_path)
    assert shown[0] == 1
    assert "450 × 450 cells, too large to show: export the allocation as csv" in shown[2]
    assert (exported[0], len(exported[1].splitlines())) == (0, 451)


def test_a_link_in_the_folder_does_not_lead_out_of_it(tmp_path):
    outside = tmp_path / "outside.png"
    outside.write_text("mine")
    folder = write_folder(tmp_path / "out")
    (folder / "rank_map.png").symlink_to(outside)
    options = ("--output", folder / "rank_map.png", "--overwrite")
    [[code, _, err]] = run_commands([("compare", folder, folder, *options)], tmp_path)
    assert (code, err) == (0, "")
    assert outside.read_text() == "mine"
    assert (folder / "rank_map.png").read_bytes().startswith(b"\x89PNG")


def test_hostile_fim_config(texts, tmp_path):
    good = json.loads(texts[RankAllocation])
    for field, value in {
        "r_min": 10**400,
        "score_exponent": 10**400,
        "fim_calibration_batches": True,
        "init_lora_weights": "os.system",
        "budget": ["rank"],
        "__class__": 1,
    }.items():
        content = copy.deepcopy(good)
        content["fim_config"][field] = value
        path = tmp_path / "fim_allocation.json"
        path.write_text(json.dumps(content))
        if field == "r_min":  # a number that no layer reaches is only unused
            content["fim_config"]["r_max"] = 3
            path.write_text(json.dumps(content))
        with pytest.raises(InvalidFileError, match="is damaged"):
            RankAllocation.load(path)
    assert RankAllocation.from_dict(good).fim_config == FimConfig()
