"""The command line's standard output and error: pipes that nobody reads, closed and full ones, any
encoding."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import POSTERIOR, here  # noqa: F401

from dfkernels import cli
from dfkernels._io.console import Console

pytestmark = [
    pytest.mark.usefixtures("here"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


def in_child(argv, *, stdout="out", stderr="err", encoding="utf-8"):
    """`dfkernels ARGV` in a forked process. stdout, stderr: a file's name, a descriptor, or None
    for closed.

    Returns the exit code, 120 where Python would fail to flush at exit, as it does at the end of a
    process.
    """
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # a forked process has none of its parent's threads
            streams = []
            for number, to in ((1, stdout), (2, stderr)):
                if to is None:
                    os.close(number)
                    streams.append(None)
                    continue
                os.dup2(
                    to if isinstance(to, int) else os.open(to, os.O_WRONLY | os.O_CREAT, 0o666),
                    number,
                )
                streams.append(
                    io.TextIOWrapper(io.FileIO(number, "w", closefd=False), encoding, "strict")
                )
            sys.stdout, sys.stderr = streams
            try:
                code = cli.main(argv)
            except SystemExit as stop:
                code = stop.code
            try:
                for stream in streams:
                    if stream is not None:
                        stream.flush()
            except OSError:
                code = 120
            os._exit(code)
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def broken():
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.mark.parametrize(
    "argv", [["env"], ["--help"], ["--version"], ["posterior", "--help"], POSTERIOR]
)
def test_a_pipe_that_nobody_reads_ends_quietly(broken, argv):
    assert in_child(argv, stdout=broken) == 141
    assert Path("err").read_text() == ""
    assert argv != POSTERIOR or np.load("out.npz")["ess"].shape == (7,)


def test_an_error_keeps_its_code_when_nobody_reads(broken):
    assert (
        in_child(["posterior", "no.npy", "x.npy", "--sigma", "1"], stdout=broken, stderr=broken)
        == 2
    )
    assert in_child(POSTERIOR, stderr=broken) == 0  # only the progress is lost


@pytest.mark.parametrize(("stdout", "stderr"), [(None, "err"), ("out", None), (None, None)])
def test_closed_standard_streams(stdout, stderr):
    assert in_child(POSTERIOR, stdout=stdout, stderr=stderr) == 0
    assert np.load("out.npz")["ess"].shape == (7,)
    assert (
        in_child(["posterior", "no.npy", "x.npy", "--sigma", "1"], stdout=stdout, stderr=stderr)
        == 2
    )
    assert in_child(["posterior"], stdout=stdout, stderr=stderr) == 2
    assert in_child(["env"], stdout=stdout, stderr=stderr) == 0


def test_closed_descriptors_are_not_given_to_the_next_files():
    """Else what C code prints there would get into the results."""
    child = os.fork()
    if child == 0:
        try:
            os.close(1)
            os.close(2)
            with Console():
                opened = os.open("y.npy", os.O_RDONLY)
            os._exit(10 + opened)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) > 12


def test_a_full_standard_output_is_an_error():
    assert in_child(["env"], stdout="/dev/full") == 2
    assert (
        Path("err").read_text()
        == "dfkernels env: error: standard output: No space left on device\n"
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-16", "utf-8"])
def test_any_encoding(encoding):
    """A name with letters that the encoding lacks, and one that is no text at all."""
    for name in ("\u00fc\u4e2d.npz", os.fsdecode(b"\xff.npz")):
        assert in_child([*POSTERIOR, "-o", name], encoding=encoding) == 0
        assert np.load(name)["ess"].shape == (7,)
        assert "written: " in Path("out").read_text(encoding)
        assert in_child(["posterior", f"no{name}", "x.npy", "--sigma", "1"], encoding=encoding) == 2
        assert "no such file" in Path("err").read_text(encoding)


def test_signs_that_an_encoding_lacks_become_ascii():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, "ascii", "strict")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        with Console():
            sys.stderr.write("━━━─ 8 × 8 σ ≤ 1 ü\n")
        assert raw.getvalue() == b"===- 8 x 8 sigma <= 1 \\xfc\n" and stream.errors == "strict"


def test_the_result_on_standard_output_is_all_there_is():
    """-o /dev/stdout: what is said about the result goes to standard error."""
    assert in_child([*POSTERIOR, "-o", "/dev/stdout"], stdout="got.npz") == 0
    assert np.load("got.npz")["mean"].shape == (7, 2, 3)
    assert "written: /dev/stdout" in Path("err").read_text()
