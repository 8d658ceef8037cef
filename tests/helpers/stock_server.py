"""A process with stock PEFT that runs every piece of code it is given in a fork of its own.

The fork starts from the imports alone, as a new process would, but without the seconds that they take.
"""

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import peft  # noqa: F401  imported once, for all forks
import torch

import helpers.tiny_models  # noqa: F401


def run(code, errors):
    """Run the code, and write what it prints to a file."""
    os.dup2(errors.fileno(), 1)
    os.dup2(errors.fileno(), 2)
    try:
        exec(compile(code, "<stock>", "exec"), {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main():
    torch.set_num_threads(1)  # a fork has no other threads
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as errors:
            child = os.fork()
            if child == 0:
                run(json.loads(line), errors)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            errors.seek(0)
            print(json.dumps([status, errors.read()]), flush=True)


if __name__ == "__main__":
    main()
