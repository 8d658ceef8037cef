"""Files of diagonals: exact round trips, all-or-nothing writing, and damaged, foreign or malicious files."""

import json
import os
import resource
import struct
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from fim_lora import FimDiagonals, InvalidFileError


def diagonals():
    generator = torch.Generator().manual_seed(0)
    return FimDiagonals(
        {
            "layers.0.q_proj": torch.rand(3, 4, generator=generator),
            "convolution": torch.rand(2, 1, 3, 3, generator=generator, dtype=torch.float64),
            "embed_tokens": torch.zeros(5, 2),
        },
        num_batches=4,
        num_examples=30,
        num_skipped_batches=1,
    )


METADATA = {
    "format": "fim_diagonals",
    "schema_version": "1",
    "num_batches": "4",
    "num_examples": "30",
    "num_skipped_batches": "1",
}


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_holds_everything(tmp_path):
    path = tmp_path / "diagonals.safetensors"
    diagonals().save(path)
    loaded = FimDiagonals.load(str(path))
    assert loaded == diagonals()
    assert repr(loaded) == "FimDiagonals(3 layers, 40 elements, 4 batches, 30 examples)"
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == METADATA
    (tmp_path / "text").touch()
    assert path.stat().st_mode == (tmp_path / "text").stat().st_mode
    assert names_in(tmp_path) == ["diagonals.safetensors", "text"]


def test_diagonals_are_compared_by_value():
    other = diagonals()
    assert other == diagonals()
    other["embed_tokens"][0, 0] = 1
    assert other != diagonals()
    assert FimDiagonals(dict(diagonals())) != diagonals()
    assert diagonals() != dict.fromkeys(diagonals(), 0)


def test_tensors_that_share_memory_and_views_are_written(tmp_path):
    base = torch.rand(6, 4)
    several = {"a": base, "b": base, "c": base[2:4], "d": base.T, "e": torch.ones(1).expand(3, 2)}
    for tensors in (several, {"c": base[2:4]}):
        FimDiagonals(tensors).save(tmp_path / "file")
        assert FimDiagonals.load(tmp_path / "file") == FimDiagonals(tensors)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ({}, ValueError, "There is no diagonal"),
        ({"a": 1.0}, TypeError, "'a' must be a tensor in float32 or float64, got float"),
        ({"a": torch.ones(2, dtype=torch.bfloat16)}, TypeError, "got torch.bfloat16"),
        ({"a": torch.ones(0, 3)}, ValueError, r"'a' has shape \(0, 3\)"),
        ({"a": torch.tensor([1.0, -1.0])}, ValueError, "finite and not negative, its elements are from -1.0 to 1.0"),
        ({"a": torch.tensor([1.0, torch.inf])}, ValueError, "finite and not negative"),
        ({"a": torch.tensor([1.0, torch.nan])}, ValueError, "finite and not negative"),
        ({"a\n": torch.ones(1)}, ValueError, "is not the name of a layer"),
        ({"": torch.ones(1)}, ValueError, "a layer name has 0 characters"),
    ],
)
def test_content_that_cannot_be_a_diagonal(content, error, message):
    with pytest.raises(error, match=message):
        FimDiagonals(content)


def test_negative_numbers():
    with pytest.raises(ValueError, match="must not be negative, got 1, -2 and 3"):
        FimDiagonals({"a": torch.ones(1)}, 1, -2, 3)


@contextmanager
def full_disk(size):
    """Files cannot grow beyond a size, as on a disk without space."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    diagonals().save(path)
    with full_disk(50_000), pytest.raises(OSError, match="cannot be written"):
        FimDiagonals({"large": torch.rand(100_000)}).save(path)
    assert FimDiagonals.load(path) == diagonals()
    assert names_in(tmp_path) == ["file"]


def test_folders_that_do_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError):
        diagonals().save(tmp_path / "missing" / "file")
    assert names_in(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        FimDiagonals.load(tmp_path / "file")


def test_what_is_not_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(InvalidFileError, match="is not a regular file"):
            FimDiagonals.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": None}, "is not a fim_diagonals file"),
        ({"format": "pt"}, "is not a fim_diagonals file"),
        ({"schema_version": None}, "schema_version None, which is not a positive integer"),
        ({"schema_version": "0"}, "schema_version '0', which is not a positive integer"),
        ({"schema_version": "1.0"}, "schema_version '1.0', which is not"),
        ({"schema_version": "١"}, "which is not a positive integer"),  # a digit of another script
        ({"schema_version": "2"}, "has schema_version 2, but this fim-lora reads up to 1: upgrade fim-lora"),
        ({"num_batches": None}, "is damaged: KeyError.* Compute the diagonals again"),
        ({"num_examples": "-1"}, "is damaged: .*'-1' is not an integer"),
        ({"num_examples": "1_0"}, "is damaged: .*'1_0' is not an integer"),
        ({"num_examples": "9" * 16}, "is damaged: .*is not between 0 and"),
        ({"num_examples": "9" * 5000}, "is damaged: .*is not an integer"),
    ],
)
def test_metadata_are_checked(tmp_path, change, message):
    metadata = {key: value for key, value in (METADATA | change).items() if value is not None}
    save_file(dict(diagonals()), tmp_path / "file", metadata)
    with pytest.raises(InvalidFileError, match=message):
        FimDiagonals.load(tmp_path / "file")


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"a": torch.ones(2, dtype=torch.int64)},
        {"a": torch.ones(2).half()},
        {"a": torch.tensor([-1.0])},
        {"a": torch.tensor([torch.nan])},
        {"a\x1b[2J": torch.ones(2)},
        {"a": torch.ones(0)},
    ],
)
def test_tensors_are_checked(tmp_path, tensors):
    save_file(tensors, tmp_path / "file", METADATA)
    with pytest.raises(InvalidFileError, match=r"is damaged.*Compute the diagonals again"):
        FimDiagonals.load(tmp_path / "file")


def file_of(header, data):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"\xff" * 64,
        b'{"format": "fim_diagonals", "schema_version": 1}',
        file_of(b"not JSON", b""),
        file_of({"__metadata__": METADATA, "a": ONE}, b""),
        file_of({"__metadata__": METADATA, "a": ONE}, b"\0" * 8),
        file_of({"__metadata__": METADATA, "a": ONE | {"shape": [2**40], "data_offsets": [0, 2**42]}}, b"\0" * 4),
        file_of({"__metadata__": METADATA, "a": ONE | {"shape": [2**62, 2**62]}}, b"\0" * 4),
        file_of({"__metadata__": METADATA, "a": ONE | {"shape": [0, 2**62, 4], "data_offsets": [0, 0]}}, b""),
        file_of({"__metadata__": METADATA, "a": ONE | {"shape": [-1]}}, b"\0" * 4),
        file_of({"__metadata__": METADATA, "a": ONE | {"dtype": "F9"}}, b"\0" * 4),
        file_of({"__metadata__": METADATA, "a": ONE, "b": ONE}, b"\0" * 4),  # two tensors at one place
        file_of({"__metadata__": METADATA | {"num_batches": 4}, "a": ONE}, b"\0" * 4),
    ],
)
def test_damaged_and_foreign_files(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InvalidFileError, match="file"):
        FimDiagonals.load(tmp_path / "file")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "file"
    diagonals().save(path)
    return path, path.read_bytes()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_truncated_files(place, data):
    path, content = place
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(InvalidFileError):
        FimDiagonals.load(path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_changed_bytes(place, data):
    """They give an error or a usable object."""
    path, content = place[0], bytearray(place[1])
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[position] = data.draw(st.integers(0, 255) | st.sampled_from(b'0123456789-+.eE"[]{},:tfnN'))
    path.write_bytes(content)
    try:
        loaded = FimDiagonals.load(path)
    except InvalidFileError:
        return
    for name, diagonal in loaded.items():
        assert name
        assert name.isprintable()
        assert diagonal.isfinite().all()
        assert diagonal.ge(0).all()
    loaded.save(path)
    assert FimDiagonals.load(path) == loaded
