"""The calibration data: a file or a dataset on the Hub, and the role of each column."""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Value

from fim_lora_command.choices import Task
from fim_lora_command.errors import CommandError, cut

from ..report.title_names import looks_like_path
from .data_files import FILE_TYPES, file_type, load_rows, read_file, require_plain_path
from .file_hash import sha256
from .hub import hub_lookup

# The columns that may hold the examples, in the order in which they are looked for.
_FORMATS: Mapping[Task, tuple[tuple[str, ...], ...]] = {
    "causal-lm": (
        ("messages",),
        ("prompt", "completion"),
        ("text",),
        ("instruction", "output"),  # Alpaca
        ("conversations",),  # ShareGPT
    ),
    "seq-cls": (("text", "label"),),
}
# Roles that a format may have besides; those of messages as in TRL.
_OPTIONAL: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("messages",): ("tools", "chat_template_kwargs"),
    ("instruction", "output"): ("input", "system", "history"),
    ("conversations",): ("tools", "chat_template_kwargs", "system"),
}
ROLES = tuple(
    dict.fromkeys(
        [role for formats in _FORMATS.values() for roles in formats for role in roles]
        + [role for roles in _OPTIONAL.values() for role in roles]
    )
)
# Usual names of the columns for a role, in lower case, for the suggestion in an error message.
_USUAL_NAMES = {
    "messages": ("messages", "conversation", "chat", "dialog", "dialogue"),
    "prompt": ("prompt", "question", "query", "input"),
    "completion": ("completion", "output", "response", "answer", "target"),
    "text": ("text", "sentence", "content", "review", "document", "question", "input"),
    "instruction": ("instruction",),
    "input": ("input", "context"),
    "output": ("output", "response", "answer"),
    "conversations": ("conversations",),
    "label": ("label", "labels", "class", "category", "target", "sentiment", "intent"),
}

_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
_DECIMAL = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
# Beginnings of the dtypes of datasets that labels may have; a column of only missing values has the last one.
_LABEL_TYPES = ("string", "large_string", "int", "uint", "bool", "null")

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
    path = Path(name)
    labels: Sequence[str | int] = ()
    label_names: Sequence[str] = ()
    if "label" in columns:
        if path.is_file() and file_type(path) in (".csv", ".tsv"):
            rows = _with_integers(name, rows, columns["label"])
        labels, label_names = _labels(name, rows, columns["label"])
    return CalibrationData(
        name=name,
        split=split,
        rows=rows,
        columns=columns,
        is_stream=path.is_file() and file_type(path) == ".txt",
        labels=labels,
        label_names=label_names,
        sha256=sha256(path) if path.is_file() else None,
    )


def is_integer(label: str) -> bool:
    """Whether a label is written as an integer is printed; `007` is not, because it may differ from `7`."""
    return _INTEGER.fullmatch(label) is not None


def find_columns(name: str, found: Sequence[str], task: Task, column_names: Mapping[str, str]) -> dict[str, str]:
    """Role to column name for the task; a role that is not in `column_names` has the column of the same name."""
    listed = ", ".join(map(_excerpt, found))
    for role, column in column_names.items():
        if column not in found:
            raise CommandError(f"{name} has no column {column!r} for the role {role!r}: choose one of {listed}.")
    for roles in _FORMATS[task]:
        columns = {role: column_names.get(role, role) for role in roles}
        others = {role: column_names.get(role, role) for role in _OPTIONAL.get(roles, ())}
        if set(column_names) <= columns.keys() | others.keys() and set(columns.values()) <= set(found):
            return columns | {role: column for role, column in others.items() if column in found}
    header = " (from its first line)" if file_type(Path(name)) in (".csv", ".tsv") else ""
    needed = ", or ".join(" and ".join(roles) for roles in _FORMATS[task])
    raise CommandError(
        f"{name} has the columns {listed}{header}, but --task {task} needs {needed}. {_column_advice(task, found)}"
    )


def _read(name: str, split: str, subset: str | None) -> Dataset:
    path, arguments = Path(name), {} if subset is None else {"name": subset}
    if path.is_file():
        return read_file(name, split)
    if path.is_dir():
        require_plain_path(path)
        # Without its path, a folder such as `json` would be taken for the reader of this name.
        return load_rows(name, str(path.absolute()), split, **arguments)
    if looks_like_path(name) or file_type(path) in FILE_TYPES:
        raise CommandError(f"{name}: no such file. Give the path of a data file, or the name of a dataset on the Hub.")
    with hub_lookup(name):
        return load_rows(name, name, split, **arguments)


def _labels(name: str, rows: Dataset, column: str) -> tuple[Sequence[str | int], Sequence[str]]:
    """Label values in the order of their ids, and their names."""
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        return range(feature.num_classes), list(feature.names)
    if not isinstance(feature, Value) or not feature.dtype.startswith(_LABEL_TYPES):
        kind = feature.dtype if isinstance(feature, Value) else type(feature).__name__
        raise CommandError(
            f"Column {column!r} of {name} holds {kind}: labels must be strings or integers. Convert the column, or "
            "choose another one with --column label=NAME."
        )
    values = rows.unique(column)
    for missing, description in ((None, "no value"), ("", "an empty label")):
        if missing in values:
            row = list(rows[column]).index(missing) + 1
            raise CommandError(f"Row {row} of {name} has {description} in column {column!r}: remove the row.")
    if len(values) < 2:
        raise CommandError(f"Column {column!r} of {name} holds one label only: classification needs two or more.")
    labels = sorted(values)
    return labels, [str(label) for label in labels]


def _with_integers(name: str, rows: Dataset, column: str) -> Dataset:
    """The rows of a table of text, with labels that are written as integers turned into integers."""
    values = [value for value in rows.unique(column) if value is not None]
    if values and all(map(is_integer, values)):
        return rows.cast_column(column, Value("int64"))
    if values and all(_DECIMAL.fullmatch(value) for value in values):
        raise CommandError(
            f"Column {column!r} of {name} holds numbers such as {values[0]}: labels must be strings or integers."
        )
    return rows


def _excerpt(column: str) -> str:
    return repr(cut(column, _MAX_COLUMN_LENGTH))


def _column_advice(task: Task, found: Sequence[str]) -> str:
    """Which options may help, by the usual names of columns."""
    lower = {column.lower(): column for column in found}
    usual = {
        role: next((lower[name] for name in names if name in lower), None) for role, names in _USUAL_NAMES.items()
    }
    # A column of instructions belongs to no other format, but its neighbors may.
    for roles in sorted(_FORMATS[task], key=lambda roles: "instruction" not in roles):
        columns = {role: usual[role] for role in roles}
        if None not in columns.values() and len(set(columns.values())) == len(columns):
            optional = {role: usual.get(role) for role in _OPTIONAL.get(roles, ())}
            columns |= {role: column for role, column in optional.items() if column not in (None, *columns.values())}
            return "Name the columns to use, for example: " + " ".join(
                f"--column {role}={_excerpt(str(column))}" for role, column in columns.items()
            )
    needed = ("text",) if task == "causal-lm" else ("text", "label")
    names = [_excerpt(found[0])] if len(found) == 1 else ["NAME"] * len(needed)
    return "Name the columns to use: " + " ".join(
        f"--column {role}={name}" for role, name in zip(needed, names, strict=False)
    )
