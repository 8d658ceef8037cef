"""Damage to JSON files, drawn by hypothesis: the same for every file format of the project."""

import json

from hypothesis import strategies as st

HOSTILE_NAMES = [
    "../../x",
    "/etc/passwd",
    "(a+)+$",
    ".*",
    "\x1b[2J",
    "=1+1",
    "",
    "a" * 2000,
    "\u202e",
    "$\\frac$",
    "0",
]


def truncated(text, data):
    """The beginning of a text, in bytes."""
    content = text.rstrip().encode()
    return content[: data.draw(st.integers(0, len(content) - 1))]


def with_changed_bytes(text, data):
    """A text with other bytes in some places."""
    content = bytearray(text.encode())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[position] = data.draw(st.integers(0, 255) | st.sampled_from(b'0123456789-+.eE"[]{},:tfnN='))
    return bytes(content)


def with_changed_values(text, data, values):
    """A text with one or two names from `HOSTILE_NAMES`, or values that the strategy `values` draws."""
    content = json.loads(text)
    for _ in range(data.draw(st.integers(1, 2))):
        *above, last = data.draw(st.sampled_from([path for path in places_in(content) if path]))
        parent = content
        for key in above:
            parent = parent[key]
        if isinstance(parent, dict) and data.draw(st.booleans()):
            parent[data.draw(st.sampled_from(HOSTILE_NAMES))] = parent.pop(last)
        else:
            # A copy, because the next change may be inside of it. `copy.deepcopy` would recurse once for each level.
            parent[last] = json.loads(json.dumps(data.draw(values)))
    return json.dumps(content).encode()


def places_in(content, path=()):
    """Every path into nested JSON."""
    yield path
    if isinstance(content, (dict, list)):
        for key in content if isinstance(content, dict) else range(len(content)):
            yield from places_in(content[key], (*path, key))
