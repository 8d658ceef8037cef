"""Errors and warnings of the command: one line on stderr each, and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch

DEBUG_VARIABLE = "FIM_LORA_DEBUG"
EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

# Longer messages of libraries list everything that would have been possible.
_MAX_MESSAGE_LENGTH = 600
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
_PACKAGE = Path(__file__).parent.parent


class CommandError(Exception):
    """An error that the user can fix; the message says how."""


def report(error: BaseException) -> int:
    """Print an error as one line, with `FIM_LORA_DEBUG=1` after its traceback, and return the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print("fim-lora: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    if _is_usage_error(error):
        print(f"fim-lora: error: {_usage_message(error)}", file=sys.stderr)
        return EXIT_USAGE
    if os.environ.get(DEBUG_VARIABLE) == "1":
        traceback.print_exception(error, file=sys.stderr)
    print(f"fim-lora: error: {_description(error)}", file=sys.stderr)
    return EXIT_ERROR


def warn(message: str) -> None:
    """Print a warning as one line."""
    print(f"fim-lora: warning: {_printable(' '.join(message.split()))}", file=sys.stderr)


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Print warnings of fim_lora as lines, and hide warnings of libraries, which are meant for programmers."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if Path(filename).is_relative_to(_PACKAGE) and issubclass(category, UserWarning):
            warn(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield


def _is_usage_error(error: BaseException) -> bool:
    """Whether typer rejected the command line; the base class of its errors depends on its version."""
    return hasattr(error, "format_message") and getattr(error, "exit_code", None) == EXIT_USAGE


def _usage_message(error: BaseException) -> str:
    command = getattr(getattr(error, "ctx", None), "command_path", "fim-lora")
    message = _shortened(error.format_message())  # type: ignore[attr-defined]
    return f"{message} (see {command} --help)"


def _description(error: BaseException) -> str:
    """The message in one line; with the type of the error if neither fim_lora nor a library raises it on purpose."""
    message = _shortened(str(error))
    if _is_out_of_memory(error):
        return "Out of memory: lower --batch-size or --max-length, or load the model with --dtype bfloat16."
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, (CommandError, OSError, ValueError, TypeError, RuntimeError, ImportError)) and message:
        return message
    return f"Unexpected {type(error).__name__}: {message} (set {DEBUG_VARIABLE}=1 to see the traceback)"


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def _shortened(message: str) -> str:
    """The message in one printable line; if that is too long, only the first nonempty line, cut if necessary."""
    lines = [_printable(" ".join(line.split())) for line in message.splitlines() if line.strip()]
    whole = " ".join(lines)
    if len(whole) <= _MAX_MESSAGE_LENGTH:
        return whole
    first = lines[0]
    return first if len(first) <= _MAX_MESSAGE_LENGTH else f"{first[:_MAX_MESSAGE_LENGTH]}…"


def _printable(line: str) -> str:
    """Escape control characters, which a terminal would execute."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in line)
