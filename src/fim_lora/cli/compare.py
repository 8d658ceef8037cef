"""`fim-lora compare`: the ranks of two results side by side, in tables, as JSON and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from ..ranks.comparison import RankComparison
from ..report.comparison_picture import draw_comparison
from ..runtime.atomic import staged_files
from .json_output import print_json
from .models import named
from .output import Result, read_result, require_writable_file, result_folder
from .provenance import provenance_facts, read_provenance
from .summary import new_console, print_grids

_NO_LAYER = "–"


def compare(first: Path, second: Path, output: Path | None, overwrite: bool, as_json: bool) -> None:
    """Print the comparison, and draw it if a file for the picture is given."""
    if output is not None:
        require_writable_file(output, overwrite)
    folders = (result_folder(first), result_folder(second))
    results = (read_result(folders[0]), read_result(folders[1]))
    comparison = RankComparison(results[0].ranks, results[1].ranks)
    if output is not None:
        with staged_files(output.parent) as stage:
            draw_comparison(comparison, (str(first), str(second)), stage / output.name)
    if as_json:
        print_json(_document(folders, results, comparison))
    else:
        _print(folders, results, comparison)


def _document(folders: Sequence[Path], results: Sequence[Result], comparison: RankComparison) -> dict[str, Any]:
    first, second = (
        {"folder": str(folder), "num_parameters": result.num_parameters, "ranks": result.ranks}
        for folder, result in zip(folders, results, strict=True)
    )
    return {
        "kind": "comparison",
        "first": first,
        "second": second,
        "num_common_layers": len(comparison.common),
        "rank_correlation": comparison.correlation,
        "different_layers": comparison.different,
        "only_first": comparison.only_first,
        "only_second": comparison.only_second,
    }


def _print(folders: Sequence[Path], results: Sequence[Result], comparison: RankComparison) -> None:
    console = new_console()
    console.print(_origins(folders, results))
    print(_correlation(comparison))
    for folder, names in zip(folders, (comparison.only_first, comparison.only_second), strict=True):
        if names:
            print(f"Only in {folder}: {_layers(len(names))}, {named(names)}")
    print()
    cells = {
        name: f"{comparison.first.get(name, _NO_LAYER)} | {comparison.second.get(name, _NO_LAYER)}"
        for grid in comparison.grids
        for name in grid.cells.values()
    }
    print_grids(console, comparison.grids, "Ranks, first | second,", cells)


def _origins(folders: Sequence[Path], results: Sequence[Result]) -> Table:
    """A column for each result."""
    facts: list[Mapping[str, str]] = [provenance_facts(read_provenance(folder)) for folder in folders]
    recorded = [heading for heading in ("Model", "Data", "Date") if any(heading in one for one in facts)]
    rows = [
        ["Folder", *map(str, folders)],
        *([heading, *(one.get(heading, "not recorded") for one in facts)] for heading in recorded),
        ["Layers", *(f"{len(result.ranks):,}" for result in results)],
        ["Parameters", *(f"{result.num_parameters:,}" for result in results)],
        ["Ranks", *(f"{min(result.ranks.values())} to {max(result.ranks.values())}" for result in results)],
    ]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("", style="bold", no_wrap=True)
    for heading in ("first", "second"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _correlation(comparison: RankComparison) -> str:
    common, value = comparison.common, comparison.correlation
    if not common:
        return "Rank correlation: undefined, because no layer is in both"
    text = "undefined, because all ranks of one of them are equal" if value is None else f"{value:.3f} (Spearman)"
    return (
        f"Rank correlation: {text}, over {_layers(len(common))} of both, of which {len(comparison.different):,} have "
        "different ranks"
    )


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count:,} layers"
