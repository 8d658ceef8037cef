"""Runs commands in another process, which a hostile file could otherwise keep from ending.

The time limit is not a measurement: it only turns an endless run into a failed test.
"""

import json
import resource
import subprocess
import sys

TIME_LIMIT = 300

RUN = """
import contextlib, io, json, sys
from fim_lora_command import main
for line in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(json.loads(line))
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


def run_commands(commands, cwd, memory=resource.RLIM_INFINITY):
    """Exit code, output and errors of every command, in a process that may use `memory` bytes of addresses."""
    lines = "".join(json.dumps([str(word) for word in command]) + "\n" for command in commands)
    result = subprocess.run(
        [sys.executable, "-c", RUN],
        input=lines,
        capture_output=True,
        text=True,
        check=True,
        cwd=cwd,
        timeout=TIME_LIMIT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (memory, memory)),
    )
    return [json.loads(line) for line in result.stdout.splitlines()]
