"""Results as one JSON document on standard output, for other programs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..rank_allocation import RankAllocation
from .output import Result


def print_json(document: Mapping[str, Any]) -> None:
    """Print JSON types. Characters outside of ASCII are escaped, as are control characters."""
    print(json.dumps(document, indent=2, allow_nan=False))


def result_document(result: Result, folder: Path, provenance: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """A result in its folder: what its file says, and its size. `more` are further entries."""
    sizes = {"num_parameters": result.num_parameters}
    if not isinstance(result, RankAllocation):
        sizes["num_parameters_before"] = result.num_parameters_before
    kind = "allocation" if isinstance(result, RankAllocation) else "compression"
    return {"kind": kind, "folder": str(folder), **sizes, **result.to_dict(), **more, "provenance": dict(provenance)}
