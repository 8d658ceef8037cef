"""Names for the title of a rank map, from recorded values that may have been changed by anyone."""

import pytest

from fim_lora.report.title_names import short_name, title_names


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("owner/model", "owner/model"),
        ("gpt2", "gpt2"),
        ("/models/a/b.gguf", "b.gguf"),
        ("./data/", "data"),
        ("~/data.csv", "data.csv"),
        ("C:\\data\\file.csv", "file.csv"),
        ("a/b/c", "c"),
    ],
)
def test_paths_are_shortened_and_names_on_the_hub_are_not(name, shown):
    assert short_name(name) == shown


def test_a_file_with_a_hash_is_shortened_however_it_is_written():
    provenance = {
        "model": {"name": "models/tiny.gguf", "sha256": "0" * 64},
        "data": {"name": "data/train.csv", "sha256": "0" * 64},
    }
    assert title_names(provenance) == {"model": "tiny.gguf", "data": "train.csv"}
    on_the_hub = {"model": {"name": "owner/model", "sha256": None}, "data": {"name": "owner/data", "sha256": None}}
    assert title_names(on_the_hub) == {"model": "owner/model", "data": "owner/data"}


def test_an_adapter_is_named_with_its_model():
    provenance = {"adapter": {"name": "owner/small", "sha256": "0" * 64}, "model": {"name": "owner/model"}}
    assert title_names(provenance) == {"model": "owner/small, an adapter of owner/model", "data": ""}


@pytest.mark.parametrize("value", [None, 3, [], "name", {}, {"name": 3}, {"name": None}, {"name": "a\x1b[2Jb"}])
def test_what_is_missing_or_no_printable_name_is_empty(value):
    assert title_names({"model": value, "data": value, "adapter": value}) == {"model": "", "data": ""}
