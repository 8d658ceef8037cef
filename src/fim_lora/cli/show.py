"""`fim-lora show`: the summary and the rank map of a folder that a command wrote."""

from pathlib import Path

from ..report.rank_map import draw_rank_map
from ..report.title_names import title_names
from ..runtime.atomic import staged_files
from .output import RANK_MAP, read_result
from .provenance import read_provenance
from .summary import print_summary


def show(folder: Path) -> None:
    """Print the summary, and draw the rank map again."""
    result = read_result(folder)
    print_summary(result, {})
    with staged_files(folder) as stage:
        draw_rank_map(result, stage / RANK_MAP, **title_names(read_provenance(folder)))
