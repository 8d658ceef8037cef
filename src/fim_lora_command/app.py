"""The commands, and how a command line is run.

A new command is one function in a file of its own, and its line in `_COMMANDS`.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version as version_of
from typing import Annotated

import typer

from .allocate import allocate_command
from .compare import compare_command
from .compress import compress_command
from .errors import EXIT_INTERRUPTED, report_error, warnings_as_lines
from .export import export_command
from .report import report_command
from .show import show_command

# In the order of the help.
_COMMANDS: Mapping[str, Callable[..., None]] = {
    "allocate": allocate_command,
    "compress": compress_command,
    "show": show_command,
    "compare": compare_command,
    "report": report_command,
    "export": export_command,
}

app = typer.Typer(
    name="fim-lora",
    help="LoRA ranks from the empirical Fisher information, as an ordinary PEFT adapter.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _name, _function in _COMMANDS.items():
    app.command(_name)(_function)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, report any error in one line, and return the exit code."""
    try:
        with warnings_as_lines():
            code = app(args=arguments, prog_name="fim-lora", standalone_mode=False)
    except typer.Abort:
        return report_error(KeyboardInterrupt())
    except (Exception, KeyboardInterrupt) as error:
        return report_error(error)
    # Depending on its version, typer turns Ctrl-C into this code or into `Abort`.
    if code == EXIT_INTERRUPTED:
        return report_error(KeyboardInterrupt())
    return code if isinstance(code, int) else 0


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fim-lora {version_of('fim-lora')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass
