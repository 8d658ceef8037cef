"""Faults of the command in a separate process: Ctrl-C in every phase, a full disk, a folder that cannot be written.

A run stops itself in the tested phase and waits there for a real signal, so that nothing depends on the speed of the
computer.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers.cli_inputs import COMPRESSED_FILES, OUR_FILES, save_adapter, save_llama, texts, write_jsonl
from helpers.fork_server import run_in_fork

# Seconds after which a process that does not end is a failure.
TIME_LIMIT = 300

# For each phase, the module and the function that is replaced: when it is called, the run prints "here" and waits.
PHASES = {
    "finding the model": ("fim_lora.cli.allocate", "find_model"),
    "reading the data": ("fim_lora.cli.allocate", "load_data"),
    "tokenizing": ("fim_lora.cli.allocate", "tokenize"),
    "loading the model": ("fim_lora.cli.allocate", "load_model"),
    "in the forward pass": ("fim_lora.fisher.calibration", "loss_of"),
    "in the backward pass": ("fim_lora.fisher.layers.linear", "squared_norms"),
    "allocating": ("fim_lora.ranks.allocation", "allocate_ranks"),
    "writing": ("fim_lora.ranks.allocation", "write_json"),
    "drawing": ("fim_lora.cli.output", "draw_rank_map"),
    "printing": ("fim_lora.cli.allocate", "print_summary"),
}
COMPRESS_PHASES = {
    "finding the adapter": ("fim_lora.cli.adapter_source", "read_lora_config"),
    "reading the data": ("fim_lora.cli.compress_inputs", "load_data"),
    "loading the model": ("fim_lora.cli.compress_inputs", "read_model"),
    "loading the adapter": ("fim_lora.cli.trained_adapter", "_require_finite"),
    "in the forward pass": ("fim_lora.fisher.calibration", "loss_of"),
    "in the backward pass": ("fim_lora.fisher.gates", "gate_gradients"),
    "measuring": ("fim_lora.fisher.evaluation", "loss_in"),
    "truncating": ("fim_lora.compression", "truncate_adapter"),
    "writing the weights": ("fim_lora.cli.trained_adapter", "load_file"),
    "writing the result": ("fim_lora.ranks.compressed", "write_json"),
    "drawing": ("fim_lora.cli.compress", "draw_size_curve"),
    "printing": ("fim_lora.cli.compress", "print_summary"),
}
ALL_PHASES = [("allocate", *phase) for phase in PHASES.items()]
ALL_PHASES += [("compress", *phase) for phase in COMPRESS_PHASES.items()]
FILES = {"allocate": OUR_FILES, "compress": COMPRESSED_FILES}

IMPORTING = """
import sys, time

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "fim_lora.cli.allocate":
            print("here", flush=True)
            time.sleep(1000)

sys.meta_path.insert(0, Finder())
from fim_lora_command import main
sys.exit(main(sys.argv[1:]))
"""

# One process for all phases, because importing everything takes longest.
RUNS = """
import contextlib, importlib, io, json, sys, time
import fim_lora.cli.compress  # before the interruption can come
from fim_lora_command import main

def wait(*args, **kwargs):
    print("here", flush=True, file=sys.__stdout__)
    time.sleep(1000)

for line in sys.stdin:
    module, name, arguments = json.loads(line)
    module = importlib.import_module(module)
    original = getattr(module, name)
    setattr(module, name, wait)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    setattr(module, name, original)
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def environment(tmp_path_factory):
    return os.environ | {"HF_DATASETS_CACHE": str(tmp_path_factory.mktemp("cache")), "OMP_NUM_THREADS": "1"}


def write_inputs(folder):
    data = write_jsonl(folder / "data.jsonl", [{"text": text} for text in texts(12)])
    model = save_llama(folder / "llama")
    return model, data, save_adapter(model, folder / "adapter")


def arguments_for(inputs, output, *options, command="allocate"):
    model, data, adapter = map(str, inputs)
    first = [adapter, "--keep", "0.5", "--eval-data", data] if command == "compress" else ["--model", model]
    sizes = ["--batches", "2", "--batch-size", "2"]
    return [command, *first, "--data", data, "--output", str(output), *sizes, *options]


def previous_output(folder):
    """A folder with a file of fim-lora, which may be replaced, and a file of the user."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text("old")
    (folder / "notes.txt").write_text("mine")
    return folder


def snapshot(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


@contextmanager
def started(code, environment, *arguments):
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # Tests that run in the background of a shell inherit that interruptions are ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def run(code, environment, *arguments, **options):
    options = {"stdout": subprocess.PIPE} | options
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=TIME_LIMIT,
        env=environment,
        **options,
    )


def test_an_interruption_while_importing(inputs, tmp_path, environment):
    arguments = arguments_for(inputs, previous_output(tmp_path / "out"), "--overwrite")
    before = snapshot(tmp_path)
    with started(IMPORTING, environment, *arguments) as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=TIME_LIMIT)
    assert (process.returncode, out, err) == (130, "", "fim-lora: interrupted\n")
    assert snapshot(tmp_path) == before


def test_an_interruption_in_every_phase(inputs, tmp_path, environment):
    with started(RUNS, environment) as process:
        for command, phase, place in ALL_PHASES:
            new = tmp_path / f"{command}, {phase}"
            old = previous_output(tmp_path / f"{command}, {phase}, again")
            for output in (new, old):
                before = snapshot(tmp_path)
                arguments = arguments_for(inputs, output, "--overwrite", command=command)
                process.stdin.write(json.dumps([*place, arguments]) + "\n")
                process.stdin.flush()
                assert process.stdout.readline() == "here\n", phase
                process.send_signal(signal.SIGINT)
                result = json.loads(process.stdout.readline())
                assert result == [130, "", "fim-lora: interrupted\n"], phase
                if phase == "printing":  # all files are complete by then
                    assert set(snapshot(output)) == {*FILES[command], *(["notes.txt"] if output == old else [])}
                    assert json.loads((output / "adapter_config.json").read_text())["peft_type"] == "LORA"
                else:
                    assert snapshot(tmp_path) == before, phase
        process.stdin.close()
        assert process.wait(TIME_LIMIT) == 0


# A process cannot fill the disk for itself alone, but it can limit the size of its files. The error number differs
# from that of a full disk, but the error is raised by the same call, in the middle of a file.
LIMITED = """
import contextlib, io, json, resource, signal, sys
import fim_lora.cli.allocate as allocate, fim_lora.cli.compress as compress
from fim_lora_command import main

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
infinity = resource.RLIM_INFINITY

def limited(write):
    def run(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, infinity))
        try:
            return write(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (infinity, infinity))

    return run

allocate.write_allocation, compress._write = limited(allocate.write_allocation), limited(compress._write)

for line in sys.stdin:
    limit, arguments = json.loads(line)
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = main(arguments)
    print(json.dumps([code, err.getvalue()]), flush=True)
"""


def test_a_disk_that_gets_full_while_writing(inputs, tmp_path, environment):
    previous_output(tmp_path / "old")
    before = snapshot(tmp_path)
    # The limits stop the run in the first file, in one of the others, and in a picture.
    limits = {"allocate": (0, 100, 2500, 8000), "compress": (0, 6000, 8000, 20_000)}
    runs = [
        (limit, arguments_for(inputs, tmp_path / name, "--overwrite", command=command))
        for command in limits
        for limit in limits[command]
        for name in ("old", "new")
    ]
    lines = [json.dumps(one) + "\n" for one in runs]
    result = run(LIMITED, environment, input="".join(lines))
    results = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(results) == len(runs), result.stderr
    for code, err in results:
        assert code == 1
        [line] = err.splitlines()
        assert line.startswith("fim-lora: error: ")
        assert "File too large" in line
    assert snapshot(tmp_path) == before


COMMAND = "import sys; from fim_lora_command import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
@pytest.mark.parametrize("command", FILES)
def test_standard_output_that_is_full(inputs, tmp_path, environment, command):
    with Path("/dev/full").open("w") as full:
        result = run(COMMAND, environment, *arguments_for(inputs, tmp_path / "out", command=command), stdout=full)
    # The files are written. Only the report could not be printed, and the exit code reports it.
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert line.startswith("fim-lora: error: ")
    assert "No space left on device" in line
    assert sorted(snapshot(tmp_path / "out")) == FILES[command]


# Root may write everywhere, so the process changes to another user if the tests run as root.
UNPRIVILEGED = """
import contextlib, io, json, os
import fim_lora.cli
from fim_lora_command import main

place, when, arguments = {values!r}
module = getattr(fim_lora.cli, arguments[0])
if os.geteuid() == 0:
    os.chown(place, 65534, 65534)
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
if when == "before":
    os.chmod(place, 0o555)
else:
    name = "_write" if arguments[0] == "compress" else "write_allocation"
    write = getattr(module, name)

    def forbidden(*args):
        os.chmod(place, 0o555)
        return write(*args)

    setattr(module, name, forbidden)
out, err = io.StringIO(), io.StringIO()
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = main(arguments)
print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


@pytest.fixture(scope="module")
def open_folder():
    """A folder that every user can reach, with inputs that every user can read."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        root.chmod(0o755)
        inputs = write_inputs(root)
        for file in (*inputs[0].iterdir(), *inputs[2].iterdir()):
            file.chmod(0o644)
        (root / "cache").mkdir()
        (root / "cache").chmod(0o777)
        yield root, inputs


@pytest.mark.parametrize("when", ["before", "meanwhile"])
@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("command", FILES)
def test_a_folder_that_cannot_be_written(open_folder, command, exists, when):
    root, inputs = open_folder
    place = root / f"{command} {exists} {when}"
    place.mkdir()
    arguments = arguments_for(inputs, place if exists else place / "out", command=command)
    result = run_in_fork(
        UNPRIVILEGED.format(values=(str(place), when, arguments)),
        "fim_lora.cli.allocate",
        "fim_lora.cli.compress",
        variables=tuple((name, str(root / "cache")) for name in ("HOME", "HF_HOME", "HF_DATASETS_CACHE", "TMPDIR")),
    )
    code, out, err = json.loads(result[1])
    assert (result[0], code, out) == (0, 1, "")
    [line] = err.splitlines()
    assert line.startswith(f"fim-lora: error: {place}")
    assert line.endswith(": Permission denied")
    assert snapshot(place) == {}
    place.chmod(0o755)
