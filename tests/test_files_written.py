"""Files that are written: whole or not at all, whatever interrupts."""

from __future__ import annotations

import errno
import io
import os
import signal
import socket
import stat
from pathlib import Path

import numpy as np
import pytest
from test_files import ATOMS, here  # noqa: F401

from dfkernels._io import files
from dfkernels._io.files import FileError


def put(path, data=b"new"):
    files.write(Path(path), lambda file: file.write(data))


def test_a_failed_write_leaves_the_old_file():
    path = Path("result.bin")
    path.write_bytes(b"old")
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        KeyboardInterrupt(),
        RuntimeError("other"),
    ):

        def fail(file, error=error):
            file.write(b"new")
            raise error

        with pytest.raises(FileError if isinstance(error, OSError) else type(error)) as raised:
            files.write(path, fail)
        assert path.read_bytes() == b"old" and os.listdir() == ["result.bin"]
        if isinstance(error, OSError):
            assert str(raised.value) == "result.bin: cannot write: No space left on device"
    put(path)
    assert path.read_bytes() == b"new" and os.listdir() == ["result.bin"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_a_write_leaves_the_old_file_and_nothing_else(number):
    Path("result.bin").write_bytes(b"old")
    child = os.fork()
    if child == 0:  # in a process of its own, since the signal ends it
        signal.signal(number, signal.SIG_DFL)
        try:
            files.write(
                Path("result.bin"), lambda file: (file.write(b"new"), os.kill(os.getpid(), number))
            )
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == number
    assert Path("result.bin").read_bytes() == b"old" and os.listdir() == ["result.bin"]


def test_signal_handlers_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    put("a")
    assert signal.getsignal(signal.SIGTERM) == before


def test_rights_are_those_of_any_new_file_or_of_the_old_one():
    Path("ordinary").touch()
    put("new")
    assert stat.S_IMODE(os.stat("new").st_mode) == stat.S_IMODE(os.stat("ordinary").st_mode)
    os.chmod("new", 0o640)
    before = os.stat("new")
    if os.geteuid() == 0:
        os.chown("new", 12345, 54321)
        before = os.stat("new")
    put("new", b"again")
    after = os.stat("new")
    assert (after.st_mode, after.st_uid, after.st_gid) == (
        before.st_mode,
        before.st_uid,
        before.st_gid,
    )


def test_symbolic_links_stay_links():
    os.mkdir("elsewhere")
    Path("elsewhere/target").write_bytes(b"old")
    os.symlink("elsewhere/target", "link")
    os.symlink("elsewhere/not-yet", "dangling")
    put("link")
    put("dangling")
    assert os.path.islink("link") and Path("elsewhere/target").read_bytes() == b"new"
    assert os.path.islink("dangling") and Path("elsewhere/not-yet").read_bytes() == b"new"
    assert sorted(os.listdir("elsewhere")) == ["not-yet", "target"]


def test_special_files_are_written_through():
    os.mkfifo("pipe")
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    files.write(Path("pipe"), lambda file: np.savez(file, a=ATOMS))
    with np.load(io.BytesIO(os.read(reader, 1 << 16))) as found:
        assert found["a"].tolist() == ATOMS.tolist()
    os.close(reader)
    assert stat.S_ISFIFO(os.lstat("pipe").st_mode)
    before = os.lstat("/dev/null")
    files.prepare(Path("/dev/null"))
    put("/dev/null")
    assert os.lstat("/dev/null").st_ino == before.st_ino and stat.S_ISCHR(before.st_mode)
    with pytest.raises(FileError, match=r"^/dev/full: cannot write: No space left on device$"):
        put("/dev/full")


def test_standard_output_that_is_a_file_keeps_what_it_has():
    """-o /dev/stdout >> log: appended to, not cut off, not replaced."""
    Path("log").write_bytes(b"before ")
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open("log", os.O_WRONLY | os.O_APPEND), 1)
            put("/dev/stdout")
            os._exit(0)
        finally:
            os._exit(99)
    assert os.waitpid(child, 0)[1] == 0
    assert Path("log").read_bytes() == b"before new"


def test_what_cannot_be_written_is_found_before_any_work():
    os.mkdir("folder")
    Path("file").touch()
    with socket.socket(socket.AF_UNIX) as s:
        s.bind("socket")
    os.symlink("loop", "loop")
    for name, message in (
        ("folder", "folder: cannot write: it is a directory"),
        ("socket", "socket: cannot write: it is a socket"),
        ("file/x", "file/x: cannot write: Not a directory"),
        ("loop", "loop: cannot write: Too many levels of symbolic links"),
        ("x" * 300, "x" * 300 + ": cannot write: File name too long"),
        ("/proc/nowhere/x", "/proc/nowhere: cannot write there: No such file or directory"),
    ):
        with pytest.raises(FileError) as error:
            files.prepare(Path(name))
        assert str(error.value) == message
    put("x" * 255)  # as long as a name may be: that of the temporary file is shorter
    assert sorted(os.listdir()) == ["file", "folder", "loop", "socket", "x" * 255]


def test_a_file_that_may_not_be_written_is_not_replaced(monkeypatch):
    Path("read-only").write_bytes(b"old")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everything
    for call in (put, lambda path: files.prepare(Path(path))):
        with pytest.raises(FileError, match=r"^read-only: cannot write: Permission denied$"):
            call("read-only")
    assert Path("read-only").read_bytes() == b"old"


def test_two_writers_of_one_file():
    """The one that ends last wins; each leaves a whole file."""

    def slow(file):
        file.write(b"slow ")
        put("shared", b"quick")
        assert Path("shared").read_bytes() == b"quick"
        file.write(b"but last")

    files.write(Path("shared"), slow)
    assert Path("shared").read_bytes() == b"slow but last" and os.listdir() == ["shared"]
