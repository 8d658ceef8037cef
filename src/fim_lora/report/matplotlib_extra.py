"""The error of pictures where matplotlib, which is optional, is not installed."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs_matplotlib() -> Iterator[None]:
    """For a block that imports a module of pictures: raises `ImportError` with a fix if matplotlib is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ImportError("Pictures need matplotlib, which is not installed: run pip install matplotlib.") from error
