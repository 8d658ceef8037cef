"""A process that imports some modules once, and runs every piece of code it is given in a fork of its own.

A fork starts from the imports alone, as a new process would, but without the seconds that they take.
"""

import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

TESTS = Path(__file__).parents[1]


@functools.cache
def _server(modules, variables):
    """The process that has imported these modules. It ends with the tests, when its input is closed."""
    command = [sys.executable, str(Path(__file__)), *modules]
    # The tracker of semaphores warns of those of tqdm, because a fork ends without the cleanup of Python.
    quiet = {"PYTHONWARNINGS": "ignore:resource_tracker:UserWarning"}
    environment = os.environ | quiet | dict(variables)
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def run_in_fork(code, *modules, variables=()):
    """Run the code where these modules are imported. Return its exit status and what it printed.

    `variables` are names and values that the environment had when the modules were imported.
    """
    process = _server(modules, variables)
    process.stdin.write(json.dumps(code) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def _run(code, output):
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    try:
        exec(compile(code, "<fork>", "exec"), {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _serve(modules):
    os.environ["OMP_NUM_THREADS"] = "1"  # a fork has no other threads
    sys.path.insert(0, str(TESTS))
    for name in modules:
        importlib.import_module(name)
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as output:
            child = os.fork()
            if child == 0:
                _run(json.loads(line), output)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            output.seek(0)
            print(json.dumps([status, output.read()]), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1:])
