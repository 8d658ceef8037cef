"""The start of the command: help, version and wrong usage without torch, and options that agree with the library."""

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
import typer.main
from packaging.version import Version
from peft import LoraConfig

from fim_lora import FimConfig
from fim_lora.cli import data
from fim_lora.config import BUDGETS, SCORES
from fim_lora.report import exports
from fim_lora_command import choices
from fim_lora_command.app import app

HEAVY = {"torch", "peft", "transformers", "datasets", "numpy", "fim_lora"}
if Version(version("typer")) >= Version("0.29"):  # older ones use it for every help
    HEAVY.add("rich")
STARTED = """
import contextlib, io, json, os, sys
from fim_lora_command import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    code = main({arguments})
print(json.dumps([code, sorted(sys.modules), os.environ.get("OMP_WAIT_POLICY")]))
"""


def started(*words, as_process=True, **variables):
    """Exit code, imported modules and wait policy of OpenMP after the command has run in a process of its own."""
    code = STARTED.format(arguments="" if as_process else list(words))
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | variables
    output = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, env=environment, check=True)
    return json.loads(output.stdout)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("--help", 0),
        ("--version", 0),
        ("allocate --help", 0),
        ("compress --help", 0),
        ("show --help", 0),
        ("export --help", 0),
        ("", 2),
        ("fly", 2),
        ("allocate", 2),
        ("allocate --model m --data d --output o --r-min 9", 2),
        ("allocate --model m --data d --output o --target-modules q,", 2),
        ("compress a --output o", 2),
        ("compress a --output o --data d", 2),
        ("export a --format x", 2),
    ],
)
def test_what_needs_no_model_imports_no_library(line, code):
    exit_code, modules, _ = started(*line.split())
    assert exit_code == code
    assert HEAVY & set(modules) == set()


def test_the_wait_policy_of_openmp_is_passive_unless_the_user_chose_one():
    assert started("--version")[2] == "PASSIVE"
    assert started("--version", OMP_WAIT_POLICY="ACTIVE")[2] == "ACTIVE"
    # In a process of somebody else, the command leaves the environment as it is.
    assert started("--version", as_process=False)[2] is None


def defaults(command):
    return {option.name: option.default for option in typer.main.get_command(app).commands[command].params}


def test_the_defaults_are_those_of_the_library():
    options, library = defaults("allocate"), FimConfig()
    assert options["batches"] == library.fim_calibration_batches
    for name in ("r_min", "r_max", "budget", "score", "score_exponent", "exact"):
        assert options[name] == getattr(library, name), name
    assert options["r"] == LoraConfig().r


def test_the_choices_are_those_of_the_library():
    assert choices.BUDGETS == BUDGETS
    assert choices.SCORES == SCORES
    assert choices.FORMATS == exports.FORMATS
    assert choices.ROLES == data.ROLES
