"""Progress on terminals and in logs."""

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
import threading

import pytest

from fim_lora.runtime import progress
from fim_lora.runtime.progress import progress_bar, waiting_lines


def run(count=4, **options):
    with progress_bar(total=count, description="eFIM", unit="batch", **options) as bar:
        for _ in range(count):
            bar.update(1)


def everything_in(terminal):
    """What was written to a terminal whose other side is closed, which Linux reports as an error."""
    parts = []
    with os.fdopen(terminal, "rb", buffering=0) as file, contextlib.suppress(OSError):
        while part := file.read(1024):
            parts.append(part)
    return b"".join(parts).decode()


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_PER_LINE", 0.0)


@pytest.mark.usefixtures("often")
def test_a_log_gets_whole_lines(capsys):
    run(show=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("\n")
    assert "\r" not in captured.err
    lines = captured.err.splitlines()
    for number in range(1, 5):
        assert any(re.match(rf"eFIM: +{25 * number}%.* {number}/4 ", line) for line in lines), lines
    assert all(line.strip() for line in lines)


@pytest.mark.usefixtures("often")
def test_a_log_gets_lines_of_what_is_iterated(capsys):
    assert list(progress_bar("abc", description="Tokenizing", unit="example", show=True)) == ["a", "b", "c"]
    assert "3/3" in capsys.readouterr().err


def test_what_is_fast_writes_nothing(capsys):
    run(show=True)
    with waiting_lines("loading"):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("often")
def test_nothing_is_shown_unless_asked_for(capsys):
    run(show=False)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("often")
def test_a_terminal_gets_a_bar_and_no_lines(monkeypatch):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        run(show=True)
        with waiting_lines("loading"):
            pass
    written = everything_in(ours)
    assert "\reFIM: 100%" in written
    assert "loading" not in written


def test_waiting_writes_lines_to_the_standard_error_of_its_beginning(monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_PER_LINE", 0.001)
    written, hidden = io.StringIO(), io.StringIO()
    seen = threading.Event()
    written.flush = seen.set  # called after each line
    monkeypatch.setattr(sys, "stderr", written)
    with waiting_lines("loading"):
        monkeypatch.setattr(sys, "stderr", hidden)  # as when the output of a library is hidden
        assert seen.wait(60)
    assert re.match(r"loading: \d+ s\n", written.getvalue())
    assert hidden.getvalue() == ""


def test_an_error_ends_the_waiting():
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="failed"), waiting_lines("loading"):
        raise RuntimeError("failed")
    assert threading.active_count() == before
