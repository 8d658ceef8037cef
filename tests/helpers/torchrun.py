"""Starts a helper module in several processes, and compares the scores that the processes return."""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch.distributed as dist

TESTS = Path(__file__).parents[1]
NUM_PROCESSES = 2
# In seconds. It is not a measurement: it only turns an endless run into a failed test, on the busiest machine, too.
TIME_LIMIT = 1200


def torchrun(module, *arguments):
    """Runs a module from the folder of the tests, where it finds the other helpers."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={NUM_PROCESSES}",
        "--module",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, module, *arguments],
        cwd=TESTS,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
        check=False,
    )


def run_cases(folder, cases):
    """In each process: writes the result or the error of every case to a file, and ends the process.

    `cases` maps names to functions of the number of the process.
    """
    rank = dist.get_rank()
    for name, function in cases.items():
        try:
            result = {"result": function(rank)}
        except Exception:
            result = {"error": traceback.format_exc()}
        Path(folder, f"{name}-{rank}.json").write_text(json.dumps(result))
    end_process()


def end_process():
    """Ends the process after all results are written.

    On a busy machine, PyTorch's own threads may abort the interpreter while it shuts down.
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def results_of(module, folder, *arguments):
    """The folder with the results of a helper module."""
    finished = torchrun(module, str(folder), *arguments)
    assert finished.returncode == 0, finished.stderr
    return folder


def outcome(folder, case):
    """The results of a case in all processes, as `run_cases` wrote them."""
    answers = [json.loads((folder / f"{case}-{rank}.json").read_text()) for rank in range(NUM_PROCESSES)]
    for answer in answers:
        assert "error" not in answer, answer["error"]
    return [answer["result"] for answer in answers]


def assert_same_scores(found, expected, relative=1e-9):
    assert found["num_batches"] == expected.num_batches
    assert list(found["layers"]) == list(expected)
    for name, score in expected.items():
        layer = found["layers"][name]
        assert layer["num_examples"] == score.num_examples
        assert layer["mean"] == pytest.approx(score.mean, rel=relative)
        assert layer["standard_error"] == pytest.approx(score.standard_error, rel=relative)
