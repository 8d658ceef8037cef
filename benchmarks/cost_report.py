"""The printed report of `cost.py`."""

from __future__ import annotations

import statistics
from typing import Any

from cost_methods import EVA, REFERENCE
from cost_timing import Breakdown, Row


def print_report(report: dict[str, Any], rows: list[Row], breakdown: Breakdown | None) -> None:
    """Print the table, the breakdown, the physical limit, the settings and the machine."""
    print(_table(rows))
    for row in rows:
        if row.method == EVA:
            passes = ", ".join(map(str, row.forward_passes))
            print(
                "\nEVA ran after the rounds, between two runs of plain LoRA. Its spread shows the ratios to each of "
                f"them. Forward passes until convergence: {passes}."
            )
    if breakdown is not None:
        print("\n" + _breakdown_lines(breakdown))
    limit = report["limit"]
    per_batch = statistics.median(next(row.seconds for row in rows if row.method == REFERENCE))
    per_batch /= report["settings"]["batches"]
    print(
        f"\nPhysical limit: {limit['operations'] / 1e9:.0f} billion operations per batch take "
        f"{limit['seconds_per_batch']:.2f} s at {limit['operations_per_second'] / 1e9:.0f} billion operations per "
        f"second. Plain LoRA takes {per_batch:.2f} s, {per_batch / limit['seconds_per_batch']:.2f} times as long."
    )
    print(f"Allocation and re-initialization with given scores: {report['allocation_seconds']:.3f} s")
    print(f"Truncation of an adapter with a given spectrum: {report['truncation_seconds']:.3f} s")
    settings, machine = report["settings"], report["machine"]
    print("\n" + ", ".join(f"{name} {value}" for name, value in settings.items()))
    print(", ".join(f"{name} {value}" for name, value in machine.items()))


def _table(rows: list[Row]) -> str:
    header = ("method", "median s", "ratio", "[min–max]", "extra peak MiB", "ratio")
    cells = [header, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(pairs)
        )
        for pairs in (list(zip(line, widths, strict=True)) for line in cells)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cells(row: Row) -> tuple[str, ...]:
    spread = f"[{min(row.ratios):.2f}–{max(row.ratios):.2f}]"
    return (
        row.label,
        f"{statistics.median(row.seconds):.2f}",
        _number(row.ratio, 2),
        spread,
        _number(row.extra_peak_mib, 1),
        _number(row.extra_peak_ratio, 2),
    )


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _breakdown_lines(breakdown: Breakdown) -> str:
    def line(label: str, seconds: float) -> str:
        return f"  {label:<52}{seconds:8.3f} s  {seconds / breakdown.calibration:6.1%}"

    return "\n".join(
        [
            "Parts of the calibration over a dataloader:",
            line("whole, with a clock around every norm", breakdown.calibration),
            line("forward + backward of the frozen model, no hooks", breakdown.frozen_passes),
            line("squared norms", breakdown.squared_norms),
            line("rest (hooks, saved inputs, sums), by difference", breakdown.other),
        ]
    )
