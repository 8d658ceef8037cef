"""Values of the cells of a row, checked."""

import json
from collections.abc import Mapping
from typing import Any

from fim_lora_command.errors import CommandError, cut

from .data import Row

_MAX_EXCERPT_LENGTH = 80


def text_of(row: Row, role: str) -> str:
    """A cell that holds text."""
    value = row.values[role]
    if value is None:
        raise CommandError(f"The {role} of {row.place} is missing: remove the row.")
    if not isinstance(value, str):
        raise CommandError(
            f"The {role} of {row.place} is not text but {type(value).__name__}: {excerpt(value)}. "
            "Convert the column to text, or choose another one."
        )
    if not value.strip():
        raise CommandError(f"The {role} of {row.place} is empty: remove the row.")
    return value


def messages_of(row: Row) -> list[dict[str, Any]]:
    """The messages of a conversation, as chat templates take them."""
    messages = row.values["messages"]
    if not messages:
        raise CommandError(f"The messages of {row.place} are empty: remove the row.")
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise CommandError(
            f"The messages of {row.place} are not a list of {{'role': …, 'content': …}}: {excerpt(messages)}. "
            "Correct or remove the row."
        )
    return _without_none(messages)


def parsed(row: Row, role: str, kind: type) -> Any:
    """A value that may be left out or be written as JSON, as TRL accepts it; dictionaries without empty keys."""
    value = row.values.get(role)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise CommandError(f"The {role} of {row.place} are not valid JSON: {error}. Correct the row.") from error
    if value is None or value == "":
        return None
    parts = value if isinstance(value, list) else []
    if not isinstance(value, kind) or not all(isinstance(one, Mapping) for one in parts):
        wanted = "a list of JSON schemas" if kind is list else "a dictionary of arguments"
        raise CommandError(
            f"The {role} of {row.place} are not {wanted} but {type(value).__name__}: {excerpt(value)}. Correct the "
            "row."
        )
    return _without_none(value)


def _without_none(value: Any) -> Any:
    """Arrow gives each dictionary the keys of all of them, but templates check whether a key is present."""
    if isinstance(value, Mapping):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    return [_without_none(one) for one in value] if isinstance(value, list) else value


def _is_message(message: object) -> bool:
    return isinstance(message, Mapping) and isinstance(message.get("role"), str) and "content" in message


def excerpt(value: object) -> str:
    """The beginning of a value, for messages."""
    return cut(repr(value), _MAX_EXCERPT_LENGTH)
