"""The console script `fim-lora`.

It is separate from the package, because importing the package takes seconds: Ctrl-C during the import, or a missing
library, must be reported in one line, too.
"""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, by default with the arguments of the process.

    The exit code is 0, 1 for an error, 2 for wrong usage, or 130 after Ctrl-C.
    """
    try:
        from fim_lora.cli.app import run
    except ModuleNotFoundError as error:
        print(
            f"fim-lora: error: The command needs packages that are not installed ({error}). "
            "Install them with: pip install 'fim-lora[cli]'",
            file=sys.stderr,
        )
        return 1
    except ImportError as error:
        print(f"fim-lora: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fim-lora: interrupted", file=sys.stderr)
        return 130
    return run(arguments)
