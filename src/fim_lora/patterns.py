"""`rank_pattern` and `alpha_pattern`: PEFT's way to give single layers a value of their own.

PEFT matches the keys as regular expressions against the end of a layer's name, at a dot; the first match in the order
of the dictionary wins.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from peft.utils.other import get_pattern_key

Value = TypeVar("Value", int, float)


def resolve_pattern(pattern: Mapping[str, Value] | None, names: Iterable[str], default: Value) -> dict[str, Value]:
    """The value of every layer, by PEFT's own matching.

    Args:
        pattern: A `rank_pattern` or `alpha_pattern`.
        names: Layer names, as in the base model.
        default: Value of a layer that no key matches.

    Returns:
        Layer name to value, in the order of `names`.
    """
    resolved = dict.fromkeys(names, default)
    unmatched = list(resolved)
    # One key at a time: Python keeps only so many compiled expressions, and PEFT's function compiles by itself.
    for key, value in (pattern or {}).items():
        matched = [name for name in unmatched if get_pattern_key([key], name) == key]
        resolved.update(dict.fromkeys(matched, value))
        unmatched = [name for name in unmatched if name not in set(matched)] if matched else unmatched
    return resolved


def write_pattern(values: Mapping[str, Value], default: Value) -> dict[str, Value]:
    """A pattern that gives every layer its value.

    Args:
        values: Layer name, as in the base model, to value, for all targets of the adapter.
        default: The global value, which needs no entry.

    Returns:
        An entry for each layer whose value is not the default. Keys are the plain names; where these would match
        another layer too (one name is the end of another), all keys are tied to the start of the name with `^`.
    """
    different = {name: value for name, value in values.items() if value != default}
    plain = {re.escape(name).replace(r"\.", "."): value for name, value in different.items()}
    if resolve_pattern(plain, values, default) == dict(values):
        return plain
    return {f"^{re.escape(name)}": value for name, value in different.items()}
