"""The printed summary of an allocation or a compression."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..compression import LoraCompression
from ..rank_allocation import RankAllocation
from ..ranks.allocate import budget_of
from ..ranks.layer_grid import LayerGrid, layer_grids

# Number of layers listed at each end of the order of sensitivity.
_NUM_EXTREMES = 5
# Without a terminal, tables need not fit a width and should not be folded.
_WIDTH_WITHOUT_TERMINAL = 200


def print_summary(
    result: RankAllocation | LoraCompression, facts: Mapping[str, str], rows: Sequence[Sequence[str]] = ()
) -> None:
    """Print budget or size, `facts` (heading to text), ranks, and the least and most sensitive layers.

    `rows` are added to the table of a compression, which has a column for before and one for after.
    """
    console = new_console()
    own_facts = _facts(result) if isinstance(result, RankAllocation) else _facts_of_compression(result)
    print_facts(console, {**own_facts, **facts})
    console.print()
    if isinstance(result, LoraCompression):
        headings, parameters, *others = result.rows()
        console.print(_before_and_after([headings, parameters, *rows, *others]))
    print_grids(console, layer_grids(result.ranks), "Ranks", result.ranks)
    if isinstance(result, RankAllocation):
        for heading, names in _extremes(result).items():
            console.print(f"[bold]{heading}[/bold]")
            console.print(_sensitivity_table(names, result))


def print_facts(console: Console, facts: Mapping[str, str]) -> None:
    """Print `facts`, heading to text, one below the other."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for heading, text in facts.items():
        table.add_row(heading, escape(text))
    console.print(table)


def print_grids(console: Console, grids: Sequence[LayerGrid], heading: str, ranks: Mapping[str, object]) -> None:
    """Print a table for each stack of layers; `ranks` maps layer names to what is printed for them."""
    for grid in grids:
        place = f"in {grid.stack}" if grid.stack else "of other layers"
        console.print(f"[bold]{escape(f'{heading} {place}')}[/bold]")
        console.print(_rank_table(grid, ranks))


def new_console() -> Console:
    """Standard output, for tables."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL, highlight=False)


def print_next_step(result: RankAllocation | LoraCompression, folder: Path) -> None:
    """Print what a new result can be used for, as one line."""
    if isinstance(result, RankAllocation):
        print(
            f"Next: get_peft_model(model, LoraConfig.from_pretrained({str(folder)!r})) creates the adapter to train; "
            "the folder holds ranks and no weights. For axolotl: "
            f"fim-lora export {quote(str(folder))} --format axolotl"
        )
    else:
        print(f"Next: PeftModel.from_pretrained(model, {str(folder)!r}) loads the adapter; it does not need fim-lora.")


def _facts(allocation: RankAllocation) -> dict[str, str]:
    uniform_ranks = dict.fromkeys(allocation.ranks, allocation.r)
    uniform = budget_of(uniform_ranks, "parameters", allocation.scores.parameters_per_rank)
    ranks = allocation.ranks.values()
    return {
        "Budget": f"{allocation.budget_used:,} of {allocation.budget:,} {allocation.budget_unit} used",
        "Ranks": f"{min(ranks)} to {max(ranks)} in {len(ranks)} layers (uniform: {allocation.r})",
        "Adapter": f"{allocation.num_parameters:,} parameters (uniform: {uniform:,})",
        "eFIM": allocation.scores.measured,
    }


def _facts_of_compression(compression: LoraCompression) -> dict[str, str]:
    kind, size = compression.size
    limit = "" if compression.r_max is None else f", r_max = {compression.r_max}"
    return {"Size": f"{kind} = {size:g}{limit}", "Criterion": compression.criterion}


def _before_and_after(rows: Sequence[Sequence[str]]) -> Table:
    """A table whose first row has the headings of the columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    headings, *others = rows
    for number, heading in enumerate(headings):
        table.add_column(escape(heading), justify="right" if number else "left", no_wrap=True)
    for row in others:
        table.add_row(*map(escape, row))
    return table


def _rank_table(grid: LayerGrid, ranks: Mapping[str, object]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("depth", justify="right", style="dim")
    for kind in grid.kinds:
        table.add_column(escape(kind), justify="right", overflow="fold")
    for depth in grid.depths:
        names = [grid.cells.get((depth, kind)) for kind in grid.kinds]
        cells = ["" if name is None else str(ranks[name]) for name in names]
        table.add_row("–" if depth is None else str(depth), *cells)
    return table


def _extremes(allocation: RankAllocation) -> dict[str, list[str]]:
    """Heading to layer names, from the least to the most sensitive."""
    by_score = sorted(allocation.scores, key=lambda name: (allocation.layer_scores[name], name))
    if len(by_score) <= 2 * _NUM_EXTREMES:
        return {"Layers from least to most sensitive": by_score}
    return {
        f"{_NUM_EXTREMES} least sensitive layers": by_score[:_NUM_EXTREMES],
        f"{_NUM_EXTREMES} most sensitive layers": by_score[-_NUM_EXTREMES:],
    }


def _sensitivity_table(names: Sequence[str], allocation: RankAllocation) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("layer", overflow="fold")
    for heading in ("norm", "mean eFIM", "± standard error", "rank"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in names:
        score = allocation.scores[name]
        error = "unknown" if score.standard_error is None else f"{score.standard_error:.2g}"
        table.add_row(escape(name), f"{score.norm:.3g}", f"{score.mean:.3g}", error, str(allocation.ranks[name]))
    return table
