"""Files are written completely or not at all."""

import os
import re
from pathlib import Path

import pytest

from fim_lora.runtime.atomic import file_restorer, staged_files, write_text


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def write_and_fail(folder, *names):
    with staged_files(folder) as stage:
        for name in names:
            (stage / name).write_text("new")
        raise KeyError


def test_an_exception_leaves_nothing_new(tmp_path):
    (tmp_path / "old").write_text("old")
    with pytest.raises(KeyError):
        write_and_fail(tmp_path, "old", "new")
    assert names_in(tmp_path) == ["old"]
    assert (tmp_path / "old").read_text() == "old"


def test_an_exception_leaves_no_new_folder(tmp_path):
    with pytest.raises(KeyError):
        write_and_fail(tmp_path / "a" / "b", "new")
    assert names_in(tmp_path / "a") == []


def write_three(folder):
    with staged_files(folder) as stage:
        for name in "abc":
            (stage / name).write_text("new")


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("failing", "abc")
def test_a_move_that_fails_is_undone_together_with_those_before(tmp_path, monkeypatch, failing, links):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.write_text("elsewhere")
    (folder / "a").symlink_to(elsewhere)
    (folder / "c").write_text("old")
    (folder / "c").chmod(0o640)
    replace = Path.replace

    def fail_at_one(path, target):
        if path.name == failing and path.parent.name == "files":
            raise PermissionError(13, "Permission denied", str(target))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fail_at_one)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(PermissionError):
        write_three(folder)
    assert names_in(folder) == ["a", "c"]
    assert (folder / "a").readlink() == elsewhere
    assert elsewhere.read_text() == "elsewhere"
    assert (folder / "c").read_text() == "old"
    assert (folder / "c").stat().st_mode & 0o777 == 0o640
    monkeypatch.setattr(Path, "replace", replace)
    write_three(folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys("abc", "new")
    assert not (folder / "a").is_symlink()
    assert elsewhere.read_text() == "elsewhere"


def no_links(*args, **kwargs):
    raise OSError(95, "Operation not supported")


def test_a_folder_in_the_place_of_a_file_is_named_and_nothing_is_moved(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "c").mkdir()
    with pytest.raises(OSError, match=re.escape(repr(str(tmp_path / "c")))):
        write_three(tmp_path)
    assert names_in(tmp_path) == ["a", "c"]
    assert (tmp_path / "a").read_text() == "old"


def test_folders_are_made_only_where_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "a" / "file", "text")
    assert names_in(tmp_path) == []
    write_text(tmp_path / "a" / "file", "text", make_folders=True)
    assert (tmp_path / "a" / "file").read_text() == "text"


@pytest.mark.parametrize("before", [None, b"before"])
@pytest.mark.parametrize("after", [None, b"after"])
def test_a_restorer_puts_back_the_file_or_its_absence(tmp_path, before, after):
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    restore = file_restorer(path)
    path.unlink(missing_ok=True)
    if after is not None:
        path.write_bytes(after)
    restore()
    assert names_in(tmp_path) == ([] if before is None else ["file"])
    assert before is None or path.read_bytes() == before
