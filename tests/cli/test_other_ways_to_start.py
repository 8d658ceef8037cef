"""`python -m fim_lora`, the completion of the shell, and the two names of the rank."""

import os
import subprocess
import sys

import pytest

from fim_lora_command import main
from fim_lora_command.app import app


def run(*words, **variables):
    return subprocess.run(words, capture_output=True, text=True, env=os.environ | variables, check=False)


def test_python_m_is_the_command(capfd):
    found = run(sys.executable, "-m", "fim_lora", "--version")
    assert main(["--version"]) == 0
    assert (found.returncode, found.stdout) == (0, capfd.readouterr().out)
    wrong = run(sys.executable, "-m", "fim_lora", "fly")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("fim-lora: error: ")


COMMAND = "import sys; from fim_lora_command import main; sys.exit(main())"


@pytest.mark.parametrize(
    ("line", "words"),
    [("fim-lora ", {"allocate", "compress", "show", "compare", "export"}), ("fim-lora allocate --sco", {"--scores"})],
)
def test_bash_completes_commands_and_options(line, words):
    """As the function that `--install-completion` writes asks for them."""
    count = len(line.split()) - (not line.endswith(" "))
    asked = {"_FIM_LORA_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(count)}
    found = run(sys.executable, "-c", COMMAND, **asked)
    assert set(found.stdout.split()) >= words
    assert found.stderr == ""


def test_the_help_has_only_the_two_options_of_completion(capfd):
    assert main(["--help"]) == 0
    options = [line for line in capfd.readouterr().out.splitlines() if "--" in line]
    assert len(options) == 4  # version, two of completion, help
    assert main(["allocate", "--help"]) == 0
    assert "-completion" not in capfd.readouterr().out


@pytest.mark.parametrize("command", ["allocate", "compress"])
def test_the_rank_has_the_same_two_names_everywhere(command):
    import typer.main

    options = {option.name: option.opts for option in typer.main.get_command(app).commands[command].params}
    assert options["r"] == ["-r", "--rank"]
