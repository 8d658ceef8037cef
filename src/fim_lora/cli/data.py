"""The calibration data: a file or a dataset on the Hub, and the role of each column."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Dataset
from datasets.exceptions import DatasetGenerationError

from .errors import CommandError
from .file_hash import sha256
from .models import Task, looks_like_path

# The columns that may hold the examples, in the order in which they are looked for.
_FORMATS: Mapping[Task, tuple[tuple[str, ...], ...]] = {
    "causal-lm": (("messages",), ("prompt", "completion"), ("text",)),
    "seq-cls": (("text", "label"),),
}
ROLES = tuple(dict.fromkeys(role for formats in _FORMATS.values() for roles in formats for role in roles))

# An empty cell and the word "NA" are text, so pandas must not turn them into missing values.
_CSV_ARGUMENTS = {"keep_default_na": False}
_READERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", _CSV_ARGUMENTS),
    ".tsv": ("csv", {"sep": "\t", **_CSV_ARGUMENTS}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {"sample_by": "document"}),
}

# Longer column names are shortened in messages: without a header, the first line of a file becomes the names.
_MAX_COLUMN_LENGTH = 40


@dataclass(frozen=True)
class Row:
    """One row of the data: its place, such as "row 3 of data.csv", and role to value."""

    place: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class CalibrationData:
    """The rows from which examples are drawn; with `is_stream`, they are one running text, not one example each.

    `columns` maps roles to column names. `labels` and `label_names` are those of `"seq-cls"`, in the order of their
    ids. `sha256` is the hash of the data file, and `None` for a dataset on the Hub.
    """

    name: str
    split: str
    rows: Dataset
    columns: Mapping[str, str]
    is_stream: bool = False
    labels: Sequence[str | int] = ()
    label_names: Sequence[str] = ()
    sha256: str | None = None

    def draw(self, count: int, seed: int) -> list[Row]:
        """Draw `count` rows at random without repetition, or all rows if there are fewer."""
        # `sample`, not `Dataset.shuffle`, because messages name the row's number in the file.
        numbers = random.Random(seed).sample(range(len(self.rows)), min(count, len(self.rows)))
        return [self._row(number) for number in numbers]

    def identity(self) -> dict[str, Any]:
        """JSON values that record which data was used."""
        return {
            "name": self.name,
            "split": self.split,
            "rows": len(self.rows),
            "columns": dict(self.columns),
            "sha256": self.sha256,
        }

    def _row(self, number: int) -> Row:
        values = self.rows[number]
        by_role = {role: values[column] for role, column in self.columns.items()}
        return Row(f"row {number + 1} of {self.name}", by_role)


def load_data(
    name: str, split: str, subset: str | None, task: Task, column_names: Mapping[str, str]
) -> CalibrationData:
    """Read a file or a dataset on the Hub, and find the role of its columns; see `AllocateOptions`."""
    rows = _read(name, split, subset)
    if len(rows) == 0:
        raise CommandError(f"{name} has no rows in split {split!r}: give another --split.")
    columns = find_columns(name, rows.column_names, task, column_names)
    labels, label_names = _labels(name, rows, columns["label"]) if "label" in columns else ((), ())
    path = Path(name)
    return CalibrationData(
        name=name,
        split=split,
        rows=rows,
        columns=columns,
        is_stream=path.is_file() and path.suffix.lower() == ".txt",
        labels=labels,
        label_names=label_names,
        sha256=sha256(path) if path.is_file() else None,
    )


def find_columns(name: str, found: Sequence[str], task: Task, column_names: Mapping[str, str]) -> dict[str, str]:
    """Role to column name for the task; a role that is not in `column_names` has the column of the same name."""
    listed = ", ".join(map(_excerpt, found))
    for role, column in column_names.items():
        if column not in found:
            raise CommandError(f"{name} has no column {column!r} for the role {role!r}: choose one of {listed}.")
    for roles in _FORMATS[task]:
        columns = {role: column_names.get(role, role) for role in roles}
        if set(column_names) <= set(roles) and set(columns.values()) <= set(found):
            return columns
    header = " (from its first line)" if Path(name).suffix.lower() in (".csv", ".tsv") else ""
    needed = ", or ".join(" and ".join(roles) for roles in _FORMATS[task])
    raise CommandError(
        f"{name} has the columns {listed}{header}, but --task {task} needs {needed}. Name the columns to use, "
        f"for example: {_column_example(task, found)}"
    )


def _read(name: str, split: str, subset: str | None) -> Dataset:
    path = Path(name)
    suffix = path.suffix.lower()
    if path.is_file():
        if suffix not in _READERS:
            raise CommandError(f"{name}: unknown type of data file. Convert it to one of {', '.join(_READERS)}.")
        builder, arguments = _READERS[suffix]
        arguments = {"data_files": str(path), **arguments}
    elif not path.is_dir() and (looks_like_path(name) or suffix in _READERS):
        raise CommandError(f"{name}: no such file. Give the path of a data file, or the name of a dataset on the Hub.")
    else:
        builder, arguments = name, ({} if subset is None else {"name": subset})
    try:
        return datasets.load_dataset(builder, split=split, **arguments)
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise CommandError(f"{name} cannot be read: {cause}") from error
    except (ValueError, FileNotFoundError) as error:
        raise CommandError(f"{name} cannot be loaded: {error}") from error


def _labels(name: str, rows: Dataset, column: str) -> tuple[Sequence[str | int], Sequence[str]]:
    """Label values in the order of their ids, and their names."""
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        return range(feature.num_classes), list(feature.names)
    values = rows.unique(column)
    for missing, description in ((None, "no value"), ("", "an empty label")):
        if missing in values:
            row = list(rows[column]).index(missing) + 1
            raise CommandError(f"Row {row} of {name} has {description} in column {column!r}: remove the row.")
    if not all(isinstance(value, (str, int)) for value in values):
        raise CommandError(f"Column {column!r} of {name} holds {feature.dtype}: labels must be strings or integers.")
    if len(values) < 2:
        raise CommandError(f"Column {column!r} of {name} holds one label only: classification needs two or more.")
    labels = sorted(values)
    return labels, [str(label) for label in labels]


def _excerpt(column: str) -> str:
    return repr(column if len(column) <= _MAX_COLUMN_LENGTH else f"{column[:_MAX_COLUMN_LENGTH]}…")


def _column_example(task: Task, found: Sequence[str]) -> str:
    pair = next(roles for roles in _FORMATS[task] if len(roles) == 2)
    roles = pair if len(found) >= 2 else ("text",)
    return " ".join(f"--column {role}={_excerpt(column)}" for role, column in zip(roles, found, strict=False))
