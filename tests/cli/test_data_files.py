"""The one file that is named is read, byte by byte, or an error says why not."""

import bz2
import csv
import gzip
import hashlib
import json
import lzma

import pytest

from fim_lora.cli.data import load_data
from fim_lora_command.errors import CommandError
from helpers.cli_inputs import allocate, compress, error_line, texts, write_jsonl


def load(path, task="causal-lm"):
    return load_data(str(path), "train", None, task, {})


@pytest.mark.parametrize(
    "name",
    [
        "data[1].jsonl",
        "x*y.jsonl",
        "a?c.jsonl",
        "[2024] project/data.jsonl",
        "{a,b}.jsonl",
        "**.jsonl",
        ".hidden.jsonl",
        "__cache__/data.jsonl",
        "with space é 日本.jsonl",
        "a:b.jsonl",
        "hf:/data.jsonl",
        "a#b%20c&d=e.jsonl",
        "~x.jsonl",
        "a'b\"c\\d.jsonl",
    ],
)
@pytest.mark.parametrize("relative", [True, False])
def test_only_the_named_file_is_read(tmp_path, monkeypatch, name, relative):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True, parents=True)
    for other in ("data1.jsonl", "xay.jsonl", "abc.jsonl", "a.jsonl", "b.jsonl", "c.jsonl"):
        write_jsonl(path.parent / other, [{"text": "another file"}] * 2)
    write_jsonl(path, [{"text": "w1"}])
    monkeypatch.chdir(tmp_path)
    data = load(name if relative else path)
    assert data.rows["text"][:] == ["w1"]
    assert data.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_compress_reads_only_the_named_files(adapter, tmp_path):
    for name, count in (("data[1].jsonl", 6), ("data1.jsonl", 3), ("eval*.jsonl", 5), ("eval2.jsonl", 3)):
        write_jsonl(tmp_path / name, [{"text": text} for text in texts(count)])
    options = ["--keep", 0.5, "--eval-data", tmp_path / "eval*.jsonl"]
    assert compress(adapter, tmp_path / "data[1].jsonl", tmp_path / "[out]", *options) == 0
    provenance = json.loads((tmp_path / "[out]" / "fim_compression.json").read_text())["provenance"]
    assert (provenance["data"]["rows"], provenance["eval_data"]["rows"]) == (6, 5)


@pytest.mark.parametrize("name", ["a::b.jsonl", "hf::x.jsonl", "$FIM_LORA_TEST.jsonl", "data[1].jsonl.gz"])
def test_a_path_that_datasets_cannot_read_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setenv("FIM_LORA_TEST", "another")
    write_jsonl(tmp_path / "another.jsonl", [{"text": "another file"}])
    write_jsonl(tmp_path / name, [{"text": "w1"}])
    with pytest.raises(CommandError, match=r"datasets cannot read a path with .* in it: rename the file or folder"):
        load(tmp_path / name)


def test_a_folder_that_datasets_would_take_for_a_pattern_is_refused(tmp_path):
    for folder in ("[2024] project", "2 project"):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "train.jsonl", [{"text": "w1"}])
    with pytest.raises(CommandError, match=r"cannot read a path with '\['"):
        load(tmp_path / "[2024] project")
    assert len(load(tmp_path / "2 project").rows) == 1


def test_a_folder_with_the_name_of_a_reader_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "json").mkdir()
    write_jsonl(tmp_path / "json" / "train.jsonl", [{"text": "w1"}])
    monkeypatch.chdir(tmp_path)
    assert load("json").rows["text"][:] == ["w1"]


@pytest.mark.parametrize(("suffix", "module"), [(".gz", gzip), (".bz2", bz2), (".xz", lzma)])
@pytest.mark.parametrize("name", ["data.jsonl", "data.CSV", "data.tsv", "data.txt"])
def test_compressed_files(tmp_path, suffix, module, name):
    content = {"data.jsonl": '{"text": "w1 w2"}\n', "data.txt": "w1 w2"}.get(name, "text\nw1 w2\n")
    path = tmp_path / f"{name}{suffix}"
    with module.open(path, "wt") as file:
        file.write(content)
    data = load(path)
    assert data.rows["text"][:] == ["w1 w2"]
    assert data.is_stream == (name == "data.txt")
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(CommandError, match="cannot be decompressed"):
        load(path)


ENCODED = {
    "data.csv": "text\ncafé w1\n",
    "data.tsv": "text\ncafé w1\n",
    "data.jsonl": '{"text": "café w1"}\n',
    "data.json": '[{"text": "café w1"}]',
    "data.txt": "café w1\n",
}


@pytest.mark.parametrize("name", ENCODED)
def test_encodings(tmp_path, name):
    path = tmp_path / name
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text(ENCODED[name], encoding=encoding)
        [text] = load(path).rows["text"][:]
        assert text.strip() == "café w1"
    path.write_text(ENCODED[name], encoding="latin-1")
    place = ENCODED[name].index("é")
    with pytest.raises(CommandError, match=rf"{name} is not encoded in UTF-8: byte {place} is 0xe9. Save it as UTF-8"):
        load(path)
    path.write_text(ENCODED[name], encoding="utf-16")
    with pytest.raises(CommandError, match=f"{name} is encoded in UTF-16: save it as UTF-8"):
        load(path)


def test_a_wrong_byte_in_a_later_block_is_found_at_its_place(tmp_path):
    path = tmp_path / "data.txt"
    path.write_bytes(b"a" * (2**20 - 1) + "é".encode() + b"b" * 10 + b"\xe9" + b"c" * 10)
    with pytest.raises(CommandError, match=f"byte {2**20 + 11:,} is 0xe9"):
        load(path)


# --- Tables of text ---

QUOTED = ['"Hello" he said', '"Never closed', 'in the "middle"', 'w1, "w2', '"', '""']


def test_quotation_marks_in_a_tsv_file_are_text(tmp_path):
    path = tmp_path / "data.tsv"
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{n % 2}\n" for n, text in enumerate(QUOTED)))
    data = load(path, "seq-cls")
    assert data.rows["text"][:] == QUOTED
    assert list(data.labels) == [0, 1]


def test_rows_that_would_swallow_each_other_in_pairs_are_kept(tmp_path):
    path = tmp_path / "data.tsv"
    # Between the marks of two rows, everything would be one well-formed cell.
    cells = ['"w1', 'w2"', '"w3', 'w4"']
    path.write_text("text\tlabel\n" + "".join(f"{cell}\ta{n}\n" for n, cell in enumerate(cells)))
    assert load(path, "seq-cls").rows["text"][:] == cells


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
def test_cells_in_quotation_marks_are_read_as_written(tmp_path, suffix, delimiter):
    cells = ['say "w1"', f"a{delimiter}b", "two\nlines", '"w2"', "", "plain", "x" * 200_000]
    path = tmp_path / f"data{suffix}"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([["text", "label"], *([cell, f"l{n}"] for n, cell in enumerate(cells))])
    assert load(path, "seq-cls").rows["text"][:] == cells


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('text,label\n"Hello" he said,a\nw1,b\n', "line 2: ',' expected after '\"'"),
        ('text,label\nw1,a\n"never closed,b\nw2,a\n', "line 4: unexpected end of data"),
        ("text,label\nw1,w2,a\nw3,w4,b\n", "line 2 has 3 cells, and its header 2"),
        ("", "data.csv is empty"),
    ],
)
def test_a_csv_file_whose_rows_are_not_clear_is_refused(tmp_path, content, message):
    path = tmp_path / "data.csv"
    path.write_text(content)
    with pytest.raises(CommandError, match="data") as error:
        load(path, "seq-cls")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", "", "is empty: give another file"),
        ("data.jsonl", "\n \n", "is empty: give another file"),
        ("data.json", "\ufeff", "is empty: give another file"),
        ("data.txt", "\n", "is empty: give another file"),
        ("data.json", "[]", "has no rows: give other data"),
        ("data.csv", "text,label\n", "has no rows: give other data"),
        ("data.tsv", "text\tlabel\n", "has no rows: give other data"),
    ],
)
def test_a_file_without_rows_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(CommandError, match=message) as error:
        load(tmp_path / name)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.csv", "text;label\nw1, w2;a\nw3;b\n", "separated by ';', and its type is read with ','"),
        ("data.csv", "text|label\nw1|a\n", "separated by '|', and its type is read with ','"),
        ("data.csv", "text\tlabel\nw1\ta\n", "rename it to .tsv"),
        ("data.tsv", "text,label\nw1,a\n", "rename it to .csv"),
    ],
)
def test_another_separator_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(CommandError) as error:
        load(tmp_path / name, "seq-cls")
    assert message in str(error.value)
    assert name in str(error.value)


def test_a_table_of_one_column_may_have_other_separators_in_its_text(tmp_path):
    (tmp_path / "data.csv").write_text("text\nw1; w2\nw3 | w4\n")
    assert load(tmp_path / "data.csv").rows["text"][:] == ["w1; w2", "w3 | w4"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize(
    ("written", "labels"),
    [
        (["007", "7", "7"], ["007", "7"]),
        (["10", "9", "0"], [0, 9, 10]),
        (["-1", "1", "1"], [-1, 1]),
        (["1e3", "x", "1"], ["1", "1e3", "x"]),
        (["True", "False", "True"], ["False", "True"]),
    ],
)
def test_labels_of_a_table_are_integers_only_if_nothing_is_lost(tmp_path, suffix, written, labels):
    path = tmp_path / f"data{suffix}"
    separator = "," if suffix == ".csv" else "\t"
    path.write_text(
        f"text{separator}label\n" + "".join(f"0{n}{separator}{label}\n" for n, label in enumerate(written))
    )
    data = load(path, "seq-cls")
    assert list(data.labels) == labels
    assert data.rows["text"][:] == ["00", "01", "02"]
    assert [str(label) for label in data.rows["label"][:]] == written


def test_decimal_labels_of_a_table(tmp_path):
    (tmp_path / "data.csv").write_text("text,label\nw1,0.5\nw2,1.0\n")
    with pytest.raises(CommandError, match=r"holds numbers such as 0\.5: labels must be strings or integers"):
        load(tmp_path / "data.csv", "seq-cls")


def test_one_line_for_a_file_in_another_encoding(llama, tmp_path, capsys):
    (tmp_path / "data.csv").write_bytes("text\ncafé\n".encode("latin-1"))
    assert allocate(llama, tmp_path / "data.csv", tmp_path / "out") == 1
    assert "data.csv is not encoded in UTF-8" in error_line(capsys)
