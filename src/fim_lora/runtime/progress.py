"""Progress bars, and lines instead of them where standard error is a file, such as the log of a job."""

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

# Without a terminal there is at most one line in this time, and none for what is faster.
_SECONDS_PER_LINE = 10.0


def progress_bar(
    iterable: Iterable[Any] | None = None, *, total: int | None = None, description: str, unit: str, show: bool
) -> Any:
    """A bar of tqdm on terminals and in notebooks; elsewhere tqdm writes its state as a line now and then."""
    options: dict[str, Any] = {}
    if not (sys.stderr.isatty() or _is_notebook()):
        seconds = _SECONDS_PER_LINE
        options = {"file": _Lines(), "mininterval": seconds, "delay": seconds, "miniters": 1, "leave": False}
    return tqdm(iterable, total=total, desc=description, unit=unit, disable=not show, **options)


@contextmanager
def waiting_lines(description: str) -> Iterator[None]:
    """Write a line now and then while the block runs, of which the length is unknown; nothing on terminals."""
    stream, done = sys.stderr, threading.Event()

    def write() -> None:
        seconds = _SECONDS_PER_LINE
        while not done.wait(_SECONDS_PER_LINE):
            print(f"{description}: {seconds:.0f} s", file=stream, flush=True)
            seconds += _SECONDS_PER_LINE

    if stream.isatty():
        yield
        return
    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        yield
    finally:
        done.set()
        writer.join()


class _Lines:
    """The part of a file that tqdm needs: each state of a bar becomes a line on standard error."""

    def write(self, text: str) -> None:
        if line := text.strip():  # tqdm returns to the beginning of the line, and clears it at the end
            print(line, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def _is_notebook() -> bool:
    return any(parent.__module__ == "tqdm.notebook" for parent in tqdm.__mro__)
