"""Sizes that a trained adapter could have, with what is predicted for them, as a table for people to read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..runtime.checked_json import require_number

SHOWN_SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
"""Sizes in the printed table, as shares of the adapter's parameters."""


class Prediction(NamedTuple):
    """A predicted increase of the loss and its standard error over examples, in units of the loss."""

    increase: float
    standard_error: float | None


def read_prediction(content: Any) -> Prediction | None:
    """A prediction from its JSON types.

    Raises `TypeError` if a value has the wrong type, `ValueError` if it is not finite or if there are not two, and
    `OverflowError` for too large integers.
    """
    if content is None:
        return None
    increase, error = content
    return Prediction(require_number(increase), None if error is None else require_number(error))


@dataclass(frozen=True)
class SizePoint:
    """One size of the adapter.

    Attributes:
        parameters: Entries of A and B.
        share: The same as a share of those of the whole adapter.
        prediction: Predicted increase of the loss; `None` without data.
        ranks: Layer name to rank.
        dropped_norm: Share of the squared norm `‖ΔW‖²_F`, summed over the layers, that is lost.
    """

    parameters: int
    share: float
    prediction: Prediction | None
    ranks: dict[str, int]
    dropped_norm: float


def size_rows(points: Sequence[SizePoint]) -> list[list[str]]:
    """A table with a heading and one row for each size, for people to read."""
    rows = [["size", "parameters", "predicted loss", "ranks", "mean rank", "layers without adapter"]]
    for point in points:
        ranks = list(point.ranks.values())
        kept = [rank for rank in ranks if rank > 0]
        rows.append(
            [
                f"{point.share:.1%}",
                f"{point.parameters:,}",
                format_prediction(point.prediction),
                f"{min(kept)} to {max(kept)}" if kept else "0",
                f"{sum(ranks) / len(ranks):.1f}",
                str(len(ranks) - len(kept)),
            ]
        )
    return rows


def format_prediction(prediction: Prediction | None) -> str:
    """A predicted increase with its standard error, for people to read."""
    if prediction is None:
        return "unknown"
    error = "" if prediction.standard_error is None else f" ± {prediction.standard_error:.2g}"
    return f"{prediction.increase:+.2g}{error}"


def format_rows(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as a table with columns aligned to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
