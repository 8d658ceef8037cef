"""Starts a helper module in several processes, and compares the scores that the processes return."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
NUM_PROCESSES = 2


def torchrun(module, *arguments, timeout=300):
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
        timeout=timeout,
        check=False,
    )


def assert_same_scores(found, expected, relative=1e-9):
    assert found["num_batches"] == expected.num_batches
    assert list(found["layers"]) == list(expected)
    for name, score in expected.items():
        layer = found["layers"][name]
        assert layer["num_examples"] == score.num_examples
        assert layer["mean"] == pytest.approx(score.mean, rel=relative)
        assert layer["standard_error"] == pytest.approx(score.standard_error, rel=relative)
