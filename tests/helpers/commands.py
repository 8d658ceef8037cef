"""Runs commands in another process, which a hostile file could otherwise keep from ending.

The time limit is not a measurement: it only turns an endless run into a failed test.
"""

import json
import resource

from helpers.fork_server import run_in_fork

TIME_LIMIT = 1200

RUN = """
import contextlib, io, json, os, resource, signal
from fim_lora_command import main
signal.alarm({limit})
os.chdir({cwd!r})
resource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))
for command in {commands!r}:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(command)
    print("RESULT", json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


def run_commands(commands, cwd, memory=resource.RLIM_INFINITY):
    """Exit code, output and errors of every command, in a process that may use `memory` bytes of addresses."""
    words = [[str(word) for word in command] for command in commands]
    code = RUN.format(limit=TIME_LIMIT, cwd=str(cwd), memory=memory, commands=words)
    status, output = run_in_fork(
        code, "fim_lora_command.app", "fim_lora.cli.show", "fim_lora.cli.compress", "fim_lora.report.rank_map"
    )
    assert status == 0, output
    return [json.loads(line.removeprefix("RESULT ")) for line in output.splitlines() if line.startswith("RESULT ")]
