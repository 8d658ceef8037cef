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


def looks_like_path(name: str) -> bool:
    """Whether a name cannot be one on the Hub, which is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1


def short_name(name: str) -> str:
    """The last part of a path; a name on the Hub, such as `owner/name`, as it is."""
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2] if looks_like_path(name) else name


def _name_in(provenance: Mapping[str, Any], key: str) -> str:
    entry = provenance.get(key)
    name = entry.get("name") if isinstance(entry, Mapping) else None
    if not isinstance(entry, Mapping) or not isinstance(name, str) or not name.isprintable():
        return ""
    # Only files have a hash, except for adapters, whose weights may come from the Hub. `folder/data.csv` looks like a
    # name on the Hub.
    is_file = key != "adapter" and entry.get("sha256") is not None
    return short_name(f"./{name}" if is_file else name)
