"""Narrow `target_modules` and `target_parameters` to the layers that keep an adapter.

An entry of a list of targets matches a name that equals it, or ends with it at a dot. A string of targets is a regular
expression for the whole name.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Sequence

from peft import LoraConfig
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND


def write_targets(config: LoraConfig, kept: Sequence[str], removed: Sequence[str]) -> None:
    """Narrow the targets of a config, in place, to exactly the layers that keep an adapter.

    The previous targets match `kept` and `removed` together: names, as in the base model, of layers and parameters.
    Names that `target_parameters` matches go there, all others to `target_modules`. The latter becomes a list of full
    names, or a regular expression where a list would match more.

    Raises `ValueError` if nothing is kept, or a kept parameter cannot be distinguished from a removed one.
    """
    if not kept:
        raise ValueError("No layer keeps an adapter: raise r_min, or train without LoRA.")
    # Configs written by older versions of PEFT do not have `target_parameters`.
    entries = getattr(config, "target_parameters", None) or []
    parameters = [name for name in kept if _matches(entries, name)]
    removed_parameters = [name for name in removed if _matches(entries, name)]
    if removed_parameters:
        _require_distinguishable(parameters, removed_parameters)
        config.target_parameters = parameters

    removed_modules = [name for name in removed if not _matches(entries, name)]
    if removed_modules:
        modules = [name for name in kept if not _matches(entries, name)]
        config.target_modules = _module_targets(config, modules, removed_modules)
        # The new targets include their effect, and PEFT accepts neither of them together with a regular expression.
        config.layers_to_transform = config.layers_pattern = None


def require_all_matched(config: LoraConfig, module_names: Sequence[str], parameter_names: Sequence[str]) -> None:
    """Refuse a config with an entry that matches nothing in the model, which PEFT ignores if another entry matches.

    Raises `ValueError`, which names the entry and the nearest names in the model.
    """
    modules = [] if isinstance(config.target_modules, str) else config.target_modules or []
    parameters = getattr(config, "target_parameters", None) or []
    for field, entries, names in (
        ("target_modules", modules, module_names),
        ("target_parameters", parameters, parameter_names),
    ):
        unmatched = sorted(set(entries).difference(*map(_endings, names)))
        if unmatched:
            raise ValueError(
                f"{unmatched[0]!r} in {field} matches nothing in the model: remove or correct it."
                f"{_nearest_names(unmatched[0], names)}"
            )


def _nearest_names(entry: str, names: Iterable[str]) -> str:
    """A sentence with the names of the model that are most like an entry; empty if none is."""
    depth = entry.count(".") + 1
    known = {".".join(name.split(".")[-depth:]) for name in names}
    found = difflib.get_close_matches(entry, sorted(known - {""}))
    return f" Near it are {', '.join(map(repr, found))}." if found else ""


def is_expression(target_modules: Collection[str] | str | None) -> bool:
    """Whether a `target_modules` is a regular expression, and not a list or `"all-linear"`."""
    return isinstance(target_modules, str) and target_modules.lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND


def _module_targets(config: LoraConfig, kept: list[str], removed: list[str]) -> set[str] | str:
    # A regular expression and layers_to_transform can leave out modules of the model whose names end like a kept
    # one. These modules are not known here, so only whole names are safe.
    by_whole_name = is_expression(config.target_modules) or config.layers_to_transform is not None
    if kept and (by_whole_name or any(_matches(set(kept), name) for name in removed)):
        return f"(?:{'|'.join(map(re.escape, kept))})"
    return set(kept)  # PEFT turns a list into a set, too


def _require_distinguishable(kept: Collection[str], removed: Sequence[str]) -> None:
    entries = set(kept)
    for name in removed:
        if _matches(entries, name):
            raise ValueError(
                f"Parameter {name!r} should lose its adapter, but its name ends with that of a parameter that keeps "
                "one, and PEFT cannot distinguish them in target_parameters: set r_min=1."
            )


def _matches(entries: Collection[str], name: str) -> bool:
    """Whether a list of targets matches a name, as in PEFT, in time that does not grow with the list."""
    return any(ending in entries for ending in _endings(name))


def _endings(name: str) -> list[str]:
    """A name and what follows each dot in it."""
    parts = name.split(".")
    return [".".join(parts[first:]) for first in range(len(parts))]
