"""Read and write `rank_pattern` and `alpha_pattern`, by PEFT's own matching.

PEFT matches the keys as regular expressions against the end of a layer's name, at a dot. The first match in the order
of the dictionary wins.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import TypeVar

from peft.utils.other import get_pattern_key

from ..fisher.converted_targets import ConvertedTargets

Value = TypeVar("Value", int, float)


def resolve_pattern(pattern: Mapping[str, Value] | None, names: Iterable[str], default: Value) -> dict[str, Value]:
    """Layer name, as in the base model, to its value; `default` where no key matches."""
    value_of = resolver(pattern, default)
    return {name: value_of(name) for name in names}


def resolver(pattern: Mapping[str, Value] | None, default: Value) -> Callable[[str], Value]:
    """As `resolve_pattern`, for one layer at a time: a function from layer name to value."""
    values = pattern or {}
    candidates = _CandidateKeys(values)
    return lambda name: values.get(candidates.first_match(name), default)


def write_pattern(values: Mapping[str, Value], default: Value) -> dict[str, Value]:
    """A pattern that gives every target of an adapter its value: an entry for each value that is not the default.

    Keys are the plain names, as in the base model. If a plain name would match another layer too (one name is the end
    of another), all keys are anchored to the start of the name with `^`.
    """
    different = {name: value for name, value in values.items() if value != default}
    plain = {re.escape(name).replace(r"\.", "."): value for name, value in different.items()}
    candidates = _CandidateKeys(plain)
    unambiguous = all(candidates.matching(name) == ([name] if name in plain else []) for name in values)
    if unambiguous or resolve_pattern(plain, values, default) == dict(values):
        return plain
    return {f"^{re.escape(name)}": value for name, value in different.items()}


def base_values(
    pattern: Mapping[str, Value] | None, names: Iterable[str], default: Value, converted: ConvertedTargets | None
) -> dict[str, Value]:
    """The rank or `lora_alpha` that PEFT would give every layer, from a pattern and the global value of a config."""
    extended = dict(pattern or {})
    # The entries that PEFT adds when it converts the targets, after those of the config.
    for name, number in ({} if converted is None else converted.fused).items():
        extended.setdefault(f"^{re.escape(name)}", default * number)
    return resolve_pattern(extended, names, default)


class _CandidateKeys:
    """The keys that may match a name.

    PEFT's function compiles every key that it is given, and Python caches only a limited number of compiled
    expressions. A thousand keys for a thousand names would take many seconds, so PEFT's function gets only these
    candidates.
    """

    # Nothing in these keys has a meaning in a regular expression, except an initial `^` and dots without a backslash.
    _LITERAL = re.compile(r"\^?((?:[^\\^$*+?{}\[\]|()]|\\[^0-9A-Za-z])+)")
    _ESCAPED = re.compile(r"\\(.)", re.DOTALL)

    def __init__(self, keys: Iterable[str]) -> None:
        self._position = {key: number for number, key in enumerate(keys)}
        self._expressions: list[str] = []
        self._texts: dict[str, str] = {}
        # (text after the last dot, length, number of dots) to literal text to keys.
        self._literal: dict[tuple[str, int, int], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for key in self._position:
            literal = self._LITERAL.fullmatch(key)
            if literal is None:
                self._expressions.append(key)
                continue
            text = self._texts[key] = self._ESCAPED.sub(r"\1", literal[1])
            self._literal[text.rpartition(".")[2], len(text), text.count(".")][text].append(key)

    def first_match(self, name: str) -> str:
        """The key that PEFT uses; where none matches, the name itself, which PEFT looks up like a key."""
        keys = self.matching(name)
        if len(keys) == 1 and self._texts.get(keys[0]) == name:
            return keys[0]  # a name matches itself, without a call of PEFT
        return get_pattern_key(keys, name)

    def matching(self, name: str) -> list[str]:
        """The keys that may match a name, in the order of the pattern."""
        keys = list(self._expressions)
        for (last_part, length, dots), by_text in self._literal.items():
            if not name.endswith(last_part):
                continue
            end = name[-length:]
            if end.count(".") < dots:  # a dot of the key may stand for another character
                keys.extend(chain.from_iterable(by_text.values()))
            else:
                keys.extend(by_text.get(end, ()))
        return sorted(keys, key=self._position.__getitem__)
