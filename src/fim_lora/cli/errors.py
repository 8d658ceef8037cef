"""What the user is told when something goes wrong: one line on stderr, and an exit code."""

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

# Longer messages of libraries are lists of everything that would have been possible.
_MAX_MESSAGE_LENGTH = 600
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
_PACKAGE = Path(__file__).parent.parent


class CommandError(Exception):
    """Something that the user can put right; the message says how."""


def report(error: BaseException) -> int:
    """Print an error as one line; with `FIM_LORA_DEBUG=1` after its traceback.

    Args:
        error: What was raised.

    Returns:
        The exit code.
    """
    if isinstance(error, KeyboardInterrupt):
        print("fim-lora: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    if is_usage_error(error):
        print(f"fim-lora: error: {_usage_message(error)}", file=sys.stderr)
        return EXIT_USAGE
    if os.environ.get(DEBUG_VARIABLE) == "1":
        traceback.print_exception(error, file=sys.stderr)
    print(f"fim-lora: error: {describe(error)}", file=sys.stderr)
    return EXIT_ERROR


def warn(message: str) -> None:
    """Print a warning as one line.

    Args:
        message: What to say.
    """
    print(f"fim-lora: warning: {_printable(' '.join(message.split()))}", file=sys.stderr)


def describe(error: BaseException) -> str:
    """The message of an error, in one line.

    Args:
        error: What was raised.

    Returns:
        The message; of an error that no code of ours or of the libraries raises on purpose, with its type.
    """
    message = _shortened(str(error))
    if _is_out_of_memory(error):
        return "Out of memory: lower --batch-size or --max-length, or load the model with --dtype bfloat16."
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, (CommandError, OSError, ValueError, TypeError, RuntimeError, ImportError)) and message:
        return message
    return f"Unexpected {type(error).__name__}: {message} (set {DEBUG_VARIABLE}=1 to see where it comes from)"


def is_usage_error(error: BaseException) -> bool:
    """Whether the command line itself is wrong.

    Args:
        error: What was raised.

    Returns:
        Whether it is an error of typer about options, whose base class depends on the version of typer.
    """
    return hasattr(error, "format_message") and getattr(error, "exit_code", None) == EXIT_USAGE


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Show the warnings of fim_lora as lines of ours, and hide those that libraries address to programmers."""

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


def _usage_message(error: BaseException) -> str:
    command = getattr(getattr(error, "ctx", None), "command_path", "fim-lora")
    message = _shortened(error.format_message())  # type: ignore[attr-defined]
    return f"{message} (see {command} --help)"


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def _shortened(message: str) -> str:
    """One line; of a very long message the first line that says something. What a terminal would obey is escaped."""
    lines = [_printable(" ".join(line.split())) for line in message.splitlines() if line.strip()]
    whole = " ".join(lines)
    if len(whole) <= _MAX_MESSAGE_LENGTH:
        return whole
    first = lines[0]
    return first if len(first) <= _MAX_MESSAGE_LENGTH else f"{first[:_MAX_MESSAGE_LENGTH]}…"


def _printable(line: str) -> str:
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in line)
