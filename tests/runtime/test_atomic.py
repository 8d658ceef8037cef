"""Files are written completely or not at all."""

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
