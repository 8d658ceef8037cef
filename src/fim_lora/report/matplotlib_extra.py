"""Pictures where matplotlib, which is optional, may not be installed: it is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .rank_facts import Result


@contextmanager
def needs_matplotlib() -> Iterator[None]:
    """For a block that imports a module of pictures: raises `ImportError` with a fix if matplotlib is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ImportError("Pictures need matplotlib, which is not installed: run pip install matplotlib.") from error


def plot_ranks(result: Result, path: str | PathLike[str] | None) -> Figure:
    """The rank map of a result, also written to `path` if one is given. Raises what `draw_rank_map` raises."""
    with needs_matplotlib():
        from .rank_map import rank_map_figure
    picture = rank_map_figure(result)
    if path is not None:
        picture.write(path)
    return picture
