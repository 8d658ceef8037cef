"""Data files: their formats, and what has to be true of one before datasets reads it."""

import bz2
import codecs
import csv
import glob
import gzip
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import datasets
import pandas as pd  # type: ignore[import-untyped]  # datasets needs it
from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError

from fim_lora_command.errors import CommandError

_READERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {"sep": ","}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {"sample_by": "document", "encoding": "utf-8-sig"}),
}
FILE_TYPES = tuple(_READERS)

_COMPRESSIONS: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_SAVE_AGAIN = "save it with commas between the cells, for example from a spreadsheet or with pandas"
_OTHER_SEPARATORS = {";": _SAVE_AGAIN, "\t": "rename it to .tsv", ",": "rename it to .csv", "|": _SAVE_AGAIN}
_DAMAGES = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
# The error of datasets for a split without rows.
_NO_ROWS = "corresponds to no data"
_BLOCK = 2**20
_MAX_CELL_LENGTH = 2**31 - 1
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def file_type(path: Path) -> str:
    """The ending that tells the format, in lower case: `.csv` of `data.CSV` and of `data.csv.gz`."""
    return (path.with_suffix("") if path.suffix.lower() in _COMPRESSIONS else path).suffix.lower()


def read_file(name: str, split: str) -> Dataset:
    """Read a data file. All cells of a table of text are text, so that `007` and `7` stay different."""
    path = Path(name)
    if file_type(path) not in _READERS:
        raise CommandError(
            f"{name}: unknown type of data file. Convert it to one of {', '.join(FILE_TYPES)}, which may be "
            f"compressed ({', '.join(_COMPRESSIONS)})."
        )
    require_plain_path(path)
    builder, arguments = _READERS[file_type(path)]
    if builder != "parquet":
        _require_utf8(path)
    if builder == "csv":
        arguments = _csv_arguments(path, **arguments)
    # datasets takes a name for a pattern.
    return load_rows(name, builder, split, data_files=glob.escape(str(path.absolute())), **arguments)


def load_rows(name: str, builder: str, split: str, **arguments: Any) -> Dataset:
    """`load_dataset`, with errors that name the data."""
    try:
        # Before datasets 4, it asks on the terminal whether to run a script of the dataset.
        return datasets.load_dataset(builder, split=split, trust_remote_code=False, **arguments)
    except DatasetGenerationError as error:
        raise CommandError(f"{name} cannot be read: {error.__cause__ or error}") from error
    except (ValueError, FileNotFoundError) as error:
        if _NO_ROWS in str(error):
            raise CommandError(f"{name} has no rows: give other data.") from error
        raise CommandError(f"{name} cannot be loaded: {error}") from error


def require_plain_path(path: Path) -> None:
    """Refuse what datasets would take for something else than a name, even with its wildcards escaped."""
    text = str(path.absolute())
    special = "[*?" if path.is_dir() or path.suffix.lower() in _COMPRESSIONS else ""
    found = [one for one in (*special, "::") if one in text]
    if os.path.expandvars(text) != text:
        found.append("$")
    if found:
        raise CommandError(f"{path}: datasets cannot read a path with {found[0]!r} in it: rename the file or folder.")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The decompressed content, as bytes."""
    opener = _COMPRESSIONS.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as file:
            yield file
    except _DAMAGES as error:
        raise CommandError(f"{path} cannot be decompressed: {error}. Copy or compress the file again.") from error


def _require_utf8(path: Path) -> None:
    """Refuse a text file in another encoding, or without text."""
    decoder, position, is_blank = codecs.getincrementaldecoder("utf-8")(), 0, True
    with _opened(path) as file:
        while block := file.read(_BLOCK):
            is_blank = is_blank and not block.removeprefix(codecs.BOM_UTF8).strip()
            if position == 0 and block.startswith(_UTF_16):
                raise CommandError(f"{path} is encoded in UTF-16: save it as UTF-8.")
            _decode(path, decoder, block, position)
            position += len(block)
        _decode(path, decoder, b"", position, final=True)
    if is_blank:
        raise CommandError(f"{path} is empty: give another file.")


def _decode(path: Path, decoder: Any, block: bytes, position: int, final: bool = False) -> None:
    try:
        decoder.decode(block, final)
    except UnicodeDecodeError as error:
        # The decoder keeps an incomplete character of the block before.
        place = position + len(block) - len(error.object) + error.start
        raise CommandError(
            f"{path} is not encoded in UTF-8: byte {place:,} is {error.object[error.start]:#04x}. Save it as UTF-8; "
            "it may be encoded in Latin-1 or Windows-1252."
        ) from error


@dataclass(frozen=True)
class _Table:
    """What a pass over a table of text found: cells of the header, rows and lines that are not blank, and a problem.

    With `is_regular`, every row has as many cells as the header.
    """

    columns: int
    num_rows: int
    num_lines: int
    is_regular: bool
    problem: str | None


def _csv_arguments(path: Path, sep: str) -> dict[str, Any]:
    _require_separator(path, sep)
    quoting = _quoting(path, sep)
    # An empty cell and the word "NA" are text, so pandas must not turn them into missing values.
    arguments = {"sep": sep, "quoting": quoting, "keep_default_na": False}
    with _opened(path) as file:
        header = pd.read_csv(file, nrows=0, **arguments).columns
    return arguments | {"features": Features({str(column): Value("string") for column in header})}


def _require_separator(path: Path, sep: str) -> None:
    """Refuse a table of one column in which another separator gives every row the same number of cells."""
    if _pass_over(path, sep, csv.QUOTE_MINIMAL).columns != 1:
        return
    for other, advice in _OTHER_SEPARATORS.items():
        table = None if other == sep else _pass_over(path, other, csv.QUOTE_MINIMAL)
        if table is not None and table.is_regular and table.columns > 1:
            raise CommandError(
                f"{path} has cells that are separated by {other!r}, and its type is read with {sep!r}: {advice}."
            )


def _quoting(path: Path, sep: str) -> int:
    """Whether quotation marks enclose cells, as in every CSV file, or are text, as in many TSV files.

    A cell of such a TSV file that begins with a quotation mark would swallow everything up to the next one.
    """
    quoted = _pass_over(path, sep, csv.QUOTE_MINIMAL)
    if quoted.problem is None and (sep == "," or quoted.num_rows == quoted.num_lines):
        return csv.QUOTE_MINIMAL
    if sep != ",":
        plain = _pass_over(path, sep, csv.QUOTE_NONE)
        # Cells in quotation marks may have line breaks in them; then the lines are not regular without the marks.
        if plain.is_regular and (plain.columns > 1 or quoted.problem is not None):
            return csv.QUOTE_NONE
    if quoted.problem is not None:
        raise CommandError(
            f"{path} cannot be read: {quoted.problem}. Enclose cells with quotation marks or separators in quotation "
            "marks, and double the marks within, or save the data as .jsonl."
        )
    return csv.QUOTE_MINIMAL


def _pass_over(path: Path, sep: str, quoting: int) -> _Table:
    columns = num_rows = num_blank = 0
    is_regular, problem = True, None
    limit = csv.field_size_limit(_MAX_CELL_LENGTH)
    with _opened(path) as file:
        text = TextIOWrapper(file, encoding="utf-8-sig", newline="")
        reader = csv.reader(text, delimiter=sep, quoting=quoting, strict=True)  # type: ignore[arg-type]
        try:
            for row in reader:
                columns = columns or len(row)
                num_rows, num_blank = num_rows + bool(row), num_blank + (not row)
                is_regular = is_regular and len(row) in (0, columns)
                if len(row) > columns:
                    problem = problem or f"line {reader.line_num} has {len(row)} cells, and its header {columns}"
        except csv.Error as error:
            problem = f"line {reader.line_num}: {error}"
        finally:
            csv.field_size_limit(limit)
    return _Table(columns, num_rows, reader.line_num - num_blank, is_regular and problem is None, problem)
