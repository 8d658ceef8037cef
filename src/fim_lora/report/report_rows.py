"""The rows of the tables in a report, as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..ranks.allocation import Allocation
from ..ranks.compressed import Compression
from .rank_facts import Result, largest_allowed_rank, measured_line, size_line, uniform_rank


def result_facts(result: Result) -> dict[str, str]:
    """Heading to text: what was measured, and what was decided by it."""
    ranks, r_max = list(result.ranks.values()), largest_allowed_rank(result)
    facts = {"Measured": measured_line(result)}
    if isinstance(result, Allocation):
        score = "norm of the gradient" if result.fim_config.score == "norm" else "mean of the eFIM"
        facts["Score"] = f"{score}, to the power {result.fim_config.score_exponent:g}"
        if result.scores.num_skipped_batches:
            facts["Skipped"] = (
                f"{result.scores.num_skipped_batches:,} batches, whose loss or gradients were not finite"
            )
    else:
        kind, size = result.size
        facts["Chosen by"] = f"{kind} = {size:g}"
    text = f"{min(ranks)} to {max(ranks)} in {len(ranks):,} layers"
    text += f", {len(result.dropped_layers):,} of them without an adapter" if result.dropped_layers else ""
    text += f"; uniform rank {uniform_rank(result):.3g} has the same size" if isinstance(result, Compression) else ""
    text += "" if r_max is None else f"; r_max = {r_max}"
    return facts | {"Size": size_line(result), "Ranks": text}


def layer_rows(result: Result) -> list[list[str]]:
    """A heading and one row for each layer, with its score and standard error or with its rank before."""
    return _scored_rows(result) if isinstance(result, Allocation) else _compressed_rows(result)


def provenance_rows(provenance: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every value that was recorded, with the keys that lead to it, such as `versions.torch`."""
    waiting: list[tuple[str, Any]] = [("", provenance)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, Mapping) and value:
            waiting += [(f"{place}.{key}" if place else str(key), value[key]) for key in reversed(list(value))]
        elif isinstance(value, list):
            yield place, printable(", ".join(str(one) for one in value)) or "none"
        elif value is not None:
            yield place, printable(str(value))


def printable(text: str) -> str:
    """The text with control characters, and those that reorder the text around them, as escapes."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def _scored_rows(allocation: Allocation) -> list[list[str]]:
    heading = ["layer", "rank", "lora_alpha", "parameters", "norm", "±", "mean eFIM", "±", "examples", "measured"]
    rows = [heading]
    for name, rank in allocation.ranks.items():
        score = allocation.scores[name]
        # The norm is the root of the mean times a constant, so its relative error is half as large.
        error = score.standard_error
        norm_error = None if error is None or score.mean == 0 else score.norm * error / (2 * score.mean)
        rows.append(
            [
                name,
                str(rank),
                f"{allocation.alphas[name]:g}" if rank else "",
                f"{rank * (score.parameters_per_rank or 0):,}",
                f"{score.norm:.3g}",
                _error(norm_error),
                f"{score.mean:.3g}",
                _error(error),
                f"{score.num_examples:,}",
                "exactly" if score.exact else "through a random projection",
            ]
        )
    return rows


def _compressed_rows(compression: Compression) -> list[list[str]]:
    rows = [["layer", "rank before", "rank after", "lora_alpha", "parameters before", "parameters after"]]
    for name, rank in compression.ranks.items():
        before, parameters = compression.ranks_before[name], compression.parameters_per_rank[name]
        alpha = f"{compression.alphas[name]:g}" if rank else ""
        rows.append([name, str(before), str(rank), alpha, f"{before * parameters:,}", f"{rank * parameters:,}"])
    return rows


def _error(error: float | None) -> str:
    return "unknown" if error is None else f"{error:.2g}"
