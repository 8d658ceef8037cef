"""The console script `fim-lora`.

It is separate from the package, because importing the package takes seconds: Ctrl-C during the import, or a missing
library, must be reported in one line, too.
"""

import sys
from collections.abc import Sequence

# What only the command imports; the extra `cli` of pyproject.toml has it.
_EXTRA = {"datasets", "gguf", "huggingface_hub", "jinja2", "matplotlib", "packaging", "rich", "typer"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, by default with the arguments of the process.

    The exit code is 0, 1 for an error, 2 for wrong usage, or 130 after Ctrl-C.
    """
    try:
        from fim_lora.cli.app import run
    except ImportError as error:
        print(f"fim-lora: error: {_explained(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fim-lora: interrupted", file=sys.stderr)
        return 130
    return run(arguments)


def _explained(error: ImportError) -> str:
    """In one line, which module is missing, and which one wanted it."""
    while isinstance(error.__cause__, ImportError):
        error = error.__cause__  # libraries that import their modules late raise it again
    message = " ".join(str(error).split())
    if not error.name:
        return message
    importer, missing = _importer(error), error.name.partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and missing in _EXTRA and importer.startswith("fim_lora"):
        return f"The command needs {missing}, which is not installed. In a clone of fim-lora: pip install '.[cli]'"
    return f"{message} (imported by {importer}). Install or upgrade {missing}, or the package that imports it."


def _importer(error: ImportError) -> str:
    """The module with the import statement that failed."""
    trace, names = error.__traceback__, [""]
    while trace is not None:
        names.append(str(trace.tb_frame.f_globals.get("__name__", "")))
        trace = trace.tb_next
    return next((name for name in reversed(names) if not name.startswith("importlib")), "")
