"""The origin of a result, from the JSON values that a command wrote with it. They may have been changed by anyone."""

from collections.abc import Mapping
from typing import Any


def title_names(provenance: Mapping[str, Any]) -> dict[str, str]:
    """`model` and `data` for the title of a rank map; a name that is missing is empty."""
    model, adapter = (_name_in(provenance, key) for key in ("model", "adapter"))
    return {
        "model": f"{adapter}, an adapter of {model}" if adapter and model else adapter or model,
        "data": _name_in(provenance, "data"),
    }


def short_name(name: str) -> str:
    """The last part of a path; a name on the Hub, such as `owner/name`, as it is."""
    is_path = name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2] if is_path else name


def _name_in(provenance: Mapping[str, Any], key: str) -> str:
    entry = provenance.get(key)
    name = entry.get("name") if isinstance(entry, Mapping) else None
    return short_name(name) if isinstance(name, str) and name.isprintable() else ""
