"""Patterns are matched for all layers at once, with the results of PEFT's matching."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from fim_lora.adapter.patterns import resolve_pattern, write_pattern

# Few characters, so that keys match: literally, by a dot that matches another character, and by expressions.
_NAME = st.text("ab1._-", min_size=1, max_size=6)
_NAMES = st.lists(_NAME, unique=True, max_size=8)
_KEYS = st.one_of(
    st.text("ab1._-", min_size=1, max_size=5),
    _NAME.map(re.escape),
    _NAME.map(lambda name: f"^{re.escape(name)}"),
    st.sampled_from(["^a", "a|b", ".*", r"\d+", r"a\.b", "[ab]", "a$", "(a|1).b", "b+", "a.", ".a", ".", "^", "^^a"]),
)


@given(names=_NAMES, keys=st.lists(_KEYS, unique=True, max_size=6))
@settings(max_examples=500, deadline=None)
def test_every_layer_gets_what_pefts_own_function_finds_for_it(names: list[str], keys: list[str]) -> None:
    pattern = {key: number for number, key in enumerate(keys, start=1)}
    # PEFT returns the name itself where no key matches, and a name may look like a key.
    expected = {name: pattern.get(get_pattern_key(keys, name), 0) for name in names}
    assert resolve_pattern(pattern, names, 0) == expected


@given(values=st.dictionaries(_NAME, st.integers(1, 3), max_size=8))
@settings(max_examples=300, deadline=None)
def test_a_written_pattern_says_what_was_meant(values: dict[str, int]) -> None:
    pattern = write_pattern(values, 1)
    assert {name: pattern.get(get_pattern_key(list(pattern), name), 1) for name in values} == values
