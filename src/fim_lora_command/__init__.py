"""The console script `fim-lora`: its options, its help and its errors.

It is a package of its own, because importing `fim_lora` imports torch and PEFT, which takes seconds. Each command
imports what it runs, from `fim_lora.cli`, after its options are checked. Ctrl-C during an import, or a missing
library, is reported in one line, too.
"""

import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, by default with the arguments of the process.

    The exit code is 0, 1 for an error, 2 for wrong usage, or 130 after Ctrl-C.
    """
    if arguments is None:  # the process belongs to the command
        _let_waiting_threads_sleep()
    try:
        from .app import run
    except ImportError as error:
        from .missing_modules import explained

        print(f"fim-lora: error: {explained(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fim-lora: interrupted", file=sys.stderr)
        return 130
    return run(arguments)


def _let_waiting_threads_sleep() -> None:
    """By default, threads of OpenMP wait in a loop, which takes the processors from others when these are busy.

    OpenMP reads the variable when torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
