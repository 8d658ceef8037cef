"""Where a result comes from: model, data and date, as the file in its folder records them."""

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fim_lora_command.errors import cut, printable

from ..ranks.allocation import ALLOCATION_FILE
from ..ranks.allocation import SCHEMA_VERSION as ALLOCATION_SCHEMA
from ..ranks.compressed import COMPRESSION_FILE
from ..ranks.compressed import SCHEMA_VERSION as COMPRESSION_SCHEMA
from ..runtime.checked_json import read_json

_LONGEST_TEXT = 500


def now() -> str:
    """The date and time, in UTC, as ISO 8601 writes them."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def read_provenance(folder: Path) -> Mapping[str, Any]:
    """What `fim-lora allocate` or `compress` recorded besides the result; empty for files that were saved in Python.

    Raises `OSError` or `InvalidFileError` if there is no such file or it is damaged.
    """
    if (folder / COMPRESSION_FILE).exists():
        return read_json(
            folder / COMPRESSION_FILE, "fim_compression", COMPRESSION_SCHEMA, _provenance, "Compress again."
        )
    return read_json(folder / ALLOCATION_FILE, "fim_allocation", ALLOCATION_SCHEMA, _provenance, "Allocate again.")


def provenance_facts(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Heading to text, for people to read. What is not recorded, or not in the expected form, is left out."""
    model = _mapping(provenance, "model")
    kind = ", ".join(filter(None, (_text(model, "class"), _text(provenance, "dtype"), _text(provenance, "device"))))
    facts = {
        "Adapter": _text(_mapping(provenance, "adapter"), "name"),
        "Model": _joined(_text(model, "name"), f" ({kind})" if kind else ""),
        "Data": _data(_mapping(provenance, "data")),
        "Evaluation": _data(_mapping(provenance, "eval_data")),
        "Date": _date(provenance),
        "Scores from": _scores(_mapping(provenance, "reallocated")),
    }
    return {heading: text for heading, text in facts.items() if text}


def _provenance(content: Mapping[str, Any]) -> Mapping[str, Any]:
    return _mapping(content, "provenance")


def _data(data: Mapping[str, Any]) -> str:
    split, rows = _text(data, "split"), data.get("rows")
    number = f": {rows:,} rows" if isinstance(rows, int) and not isinstance(rows, bool) else ""
    return _joined(_text(data, "name"), (f", split {split}" if split else "") + number)


def _scores(reallocated: Mapping[str, Any]) -> str:
    date = _date(reallocated)
    return _joined(_text(reallocated, "scores"), f", allocated again {date}" if date else "")


def _date(content: Mapping[str, Any]) -> str:
    try:
        date = datetime.fromisoformat(_text(content, "date"))
        return f"{date.astimezone(timezone.utc):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError):
        return ""


def _joined(text: str, more: str) -> str:
    return text + more if text else ""


def _mapping(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = content.get(key)
    return value if isinstance(value, Mapping) else {}


def _text(content: Mapping[str, Any], key: str) -> str:
    """A text of limited length without control characters, which a terminal would execute; empty for other values."""
    value = content.get(key)
    if not isinstance(value, str):
        return ""
    return printable(cut(value, _LONGEST_TEXT))
