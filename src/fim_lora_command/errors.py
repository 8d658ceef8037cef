"""Errors and warnings of the command: one line on stderr each, and an exit code."""

import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer

from .missing_modules import explained

DEBUG_VARIABLE = "FIM_LORA_DEBUG"
EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

# Longer messages come from libraries, and list all valid values.
_MAX_MESSAGE_LENGTH = 600
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
_LIBRARY = Path(__file__).parents[1] / "fim_lora"


class CommandError(Exception):
    """An error that the user can fix; the message says how."""


def wrong_usage(option: str, message: str) -> typer.BadParameter:
    """The error of an option whose value is wrong."""
    return typer.BadParameter(message, param_hint=f"'{option}'")


def require_choice(option: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is not one of the choices."""
    if value not in choices:
        raise wrong_usage(option, f"{value!r} is not one of {', '.join(choices)}.")


def report_error(error: BaseException) -> int:
    """Print an error as one line, and return the exit code. With `FIM_LORA_DEBUG=1` print its traceback first."""
    if isinstance(error, KeyboardInterrupt):
        print("fim-lora: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    if _is_usage_error(error):
        command = getattr(getattr(error, "ctx", None), "command_path", "fim-lora")
        message = _shortened(error.format_message())  # type: ignore[attr-defined]
        print(f"fim-lora: error: {message} (see {command} --help)", file=sys.stderr)
        return EXIT_USAGE
    if os.environ.get(DEBUG_VARIABLE) == "1":
        traceback.print_exception(error, file=sys.stderr)
    print(f"fim-lora: error: {_description(error)}", file=sys.stderr)
    return EXIT_ERROR


def warn(message: str) -> None:
    """Print a warning as one line."""
    print(f"fim-lora: warning: {printable(' '.join(message.split()))}", file=sys.stderr)


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Print warnings of fim_lora as lines, and hide warnings of libraries, which are meant for programmers."""

    def show(message: Warning | str, category: type[Warning], filename: str, *_: object, **__: object) -> None:
        is_own = category.__module__.startswith("fim_lora.") or Path(filename).is_relative_to(_LIBRARY)
        if is_own and issubclass(category, UserWarning):
            warn(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield


def _is_usage_error(error: BaseException) -> bool:
    """Whether typer rejected the command line; the base class of its errors depends on its version."""
    return hasattr(error, "format_message") and getattr(error, "exit_code", None) == EXIT_USAGE


def _description(error: BaseException) -> str:
    """The message in one line; with the type of the error if neither fim_lora nor a library raises it on purpose."""
    message = _shortened(str(error))
    if is_out_of_memory(error):
        return "Out of memory: lower --batch-size or --max-length, or load the model with --dtype bfloat16."
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, ImportError):
        return _shortened(explained(error))
    if isinstance(error, (CommandError, OSError, ValueError, TypeError, RuntimeError)) and message:
        return message
    return f"Unexpected {type(error).__name__}: {message} (set {DEBUG_VARIABLE}=1 to see the traceback)"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the host or of the device was exhausted."""
    if isinstance(error, MemoryError):
        return True
    # The error of torch for a device is a RuntimeError, too.
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def _shortened(message: str) -> str:
    """The message in one printable line; if that is too long, only the first nonempty line, cut if necessary."""
    lines = [printable(" ".join(line.split())) for line in message.splitlines() if line.strip()]
    whole = " ".join(lines)
    text = whole if len(whole) <= _MAX_MESSAGE_LENGTH else lines[0]
    return cut(text, _MAX_MESSAGE_LENGTH)


def cut(text: str, longest: int) -> str:
    """The text, or its beginning and an ellipsis if it has more characters."""
    return text if len(text) <= longest else f"{text[:longest]}…"


def printable(text: str) -> str:
    """Escape control characters, which a terminal would execute."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
