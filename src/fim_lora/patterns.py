"""PEFT's ways to name layers in a config: patterns, which give single layers a value of their own, and targets.

PEFT matches the keys of `rank_pattern` and `alpha_pattern` as regular expressions against the end of a layer's name,
at a dot; the first match in the order of the dictionary wins. An entry of a list of targets matches a name that equals
it or ends with it, at a dot; a string of targets is a regular expression for the whole name.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import TypeVar

from peft import LoraConfig
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
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
    value_of = resolver(pattern, default)
    return {name: value_of(name) for name in names}


def resolver(pattern: Mapping[str, Value] | None, default: Value) -> Callable[[str], Value]:
    """PEFT's own matching, for one layer after the other.

    Args:
        pattern: A `rank_pattern` or `alpha_pattern`.
        default: Value of a layer that no key matches.

    Returns:
        A function from layer name, as in the base model, to value.
    """
    values = pattern or {}
    possible = _PossibleKeys(values)
    return lambda name: values.get(possible.first_match(name), default)


class _PossibleKeys:
    """The keys that may match a name.

    PEFT's function compiles every key that it is given, and Python keeps only so many compiled expressions. So a
    thousand keys for a thousand names take it many seconds, and it is asked only about those that may match.
    """

    # Nothing in it has a meaning in a regular expression, but for an initial `^` and dots that are not escaped.
    _LITERAL = re.compile(r"\^?((?:[^\\^$*+?{}\[\]|()]|\\[^0-9A-Za-z])+)")
    _ESCAPED = re.compile(r"\\(.)", re.DOTALL)

    def __init__(self, keys: Iterable[str]) -> None:
        self._position = {key: number for number, key in enumerate(keys)}
        self._expressions: list[str] = []
        self._texts: dict[str, str] = {}
        # By what follows the last dot, length and number of dots; in it, keys by what they say.
        self._literal: dict[tuple[str, int, int], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for key in self._position:
            literal = self._LITERAL.fullmatch(key)
            if literal is None:
                self._expressions.append(key)
                continue
            text = self._texts[key] = self._ESCAPED.sub(r"\1", literal[1])
            self._literal[text.rpartition(".")[2], len(text), text.count(".")][text].append(key)

    def first_match(self, name: str) -> str:
        """The key that PEFT takes; the name itself where none matches, which PEFT looks up like a key."""
        keys = self.of(name)
        if len(keys) == 1 and self._texts.get(keys[0]) == name:
            return keys[0]  # a name matches itself: PEFT need not be asked
        found: str = get_pattern_key(keys, name)
        return found

    def of(self, name: str) -> list[str]:
        """In the order of the pattern."""
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
    possible = _PossibleKeys(plain)
    alone = all(possible.of(name) == ([name] if name in plain else []) for name in values)
    if alone or resolve_pattern(plain, values, default) == dict(values):
        return plain
    return {f"^{re.escape(name)}": value for name, value in different.items()}


def write_targets(config: LoraConfig, kept: Sequence[str], dropped: Sequence[str]) -> None:
    """Narrow the targets of a config, in place, to exactly the layers that keep an adapter.

    Names that `target_parameters` of the config matches go there, all others to `target_modules`. The latter is a
    list of full names, or a regular expression where a list would match more.

    Args:
        config: The config, with the targets that gave `kept` and `dropped` together.
        kept: Names, as in the base model, of the layers and parameters that keep an adapter.
        dropped: Names of those that lose it.

    Raises:
        ValueError: If nothing is kept, or a parameter that is kept cannot be told from one that is dropped.
    """
    if not kept:
        raise ValueError("No layer keeps an adapter: raise r_min, or train without LoRA.")
    # `target_parameters` is unknown to configs written by older versions of PEFT.
    entries = getattr(config, "target_parameters", None) or []
    parameters = [name for name in kept if _matches(entries, name)]
    dropped_parameters = [name for name in dropped if _matches(entries, name)]
    if dropped_parameters:
        _require_told_apart(parameters, dropped_parameters)
        config.target_parameters = parameters

    dropped_modules = [name for name in dropped if not _matches(entries, name)]
    if dropped_modules:
        modules = [name for name in kept if not _matches(entries, name)]
        config.target_modules = _module_targets(config, modules, dropped_modules)
        # They have done their part, and PEFT takes none beside a regular expression.
        config.layers_to_transform = config.layers_pattern = None


def _module_targets(config: LoraConfig, kept: list[str], dropped: list[str]) -> set[str] | str:
    # A regular expression and layers_to_transform can leave out modules of the model whose names end like a kept
    # one; these are not known here, so only whole names will do.
    by_whole_name = is_expression(config.target_modules) or config.layers_to_transform is not None
    if kept and (by_whole_name or any(_matches(set(kept), name) for name in dropped)):
        return f"(?:{'|'.join(map(re.escape, kept))})"
    return set(kept)  # which PEFT makes of a list, too


def is_expression(target_modules: Collection[str] | str | None) -> bool:
    """Whether a `target_modules` is a regular expression, and no list or `"all-linear"`.

    Args:
        target_modules: The `target_modules` of a config.

    Returns:
        Whether it is one.
    """
    return isinstance(target_modules, str) and target_modules.lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND


def _require_told_apart(kept: Collection[str], dropped: Sequence[str]) -> None:
    entries = set(kept)
    for name in dropped:
        if _matches(entries, name):
            raise ValueError(
                f"Parameter {name!r} should lose its adapter, but its name ends with that of a parameter that keeps "
                "one, and PEFT cannot tell them apart in target_parameters: set r_min=1."
            )


def _matches(entries: Collection[str], name: str) -> bool:
    """Whether a list of targets matches a name, as PEFT does it, in time that does not grow with the list."""
    parts = name.split(".")
    return any(".".join(parts[first:]) in entries for first in range(len(parts)))
