"""Files written whole or not at all, what tells their contents apart, and the error for a file."""

from __future__ import annotations

import errno
import io
import os
import secrets
import signal
import stat
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor


class FileError(ValueError):
    """A file that cannot be read or written, or holds the wrong thing; the message starts with its
    name."""


_TEMPORARY = ".dfkernels-*.tmp"
LEFT_BEHIND = (_TEMPORARY, ".tmp??????")  # by a process that was killed; the other is safetensors'


def write(path: Path, fill: Callable[[BinaryIO], object], workspace: Path | None = None) -> None:
    """Write a file whole or not at all: any failure or signal leaves what was there before.

    A regular file is written beside its place and then renamed, with the owner and the rights of
    the file that it replaces; of several hard links only this name is replaced. A symbolic link
    stays one, and what it points to is written. A FIFO or a character device takes the bytes and
    stays what it is.

    Args:
        path: The file.
        fill: Called with an open binary file, to which it writes. A file with a `name` may be
            replaced by another one of that name.
        workspace: A folder of the same file system, for the file until it is renamed; None for the
            one of its place.

    Raises:
        FileError: A full disk, no permission, no such folder, or a directory or another thing that
            is no file.
    """
    try:
        found = _existing(path)
        through = None if found is None else _through(path, found)
        if through is None:
            target = Path(os.path.realpath(path))
            _replace(target, workspace or target.parent, found, fill)
            return
        buffer = io.BytesIO()  # what `fill` writes may need a file in which one can go back
        fill(buffer)
        with open(through, "wb") as file:
            file.write(buffer.getbuffer())
    except OSError as error:
        raise FileError(f"{path}: cannot write: {error.strerror or error}") from None


def prepare(path: Path) -> None:
    """Make the folder of a result and check, before any work, that the result can be written.

    Raises:
        FileError: It cannot.
    """
    if is_replaced(path):
        folder(Path(os.path.realpath(path)).parent)


def is_replaced(path: Path) -> bool:
    """Tell whether `write` makes or replaces a regular file, and does not write through to what is
    there.

    Raises:
        FileError: It cannot be written.
    """
    try:
        found = _existing(path)
    except OSError as error:
        raise FileError(f"{path}: cannot write: {error.strerror or error}") from None
    return found is None or (stat.S_ISREG(found.st_mode) and _standard_stream(found) is None)


def folder(path: Path) -> Path:
    """Make a folder if it is missing, check that files can be written to it, and return it.

    Raises:
        FileError: It cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise FileError(f"{path}: cannot write there: {error.strerror or error}") from None


def is_standard_output(path: Path) -> bool:
    """Tell whether what is written to ``path`` goes where print does, as with /dev/stdout."""
    try:
        return _standard_stream(os.stat(path)) == 1
    except OSError:
        return False


def is_same(path: Path, other: Path) -> bool:
    """Tell whether two names, links followed, are those of one existing file."""
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False


def kind(mode: int) -> str:
    """Say in words what kind of thing has the st_mode ``mode``: "directory", "FIFO", ..."""
    kinds = {
        stat.S_IFDIR: "directory",
        stat.S_IFIFO: "FIFO",
        stat.S_IFSOCK: "socket",
        stat.S_IFCHR: "character device",
        stat.S_IFBLK: "block device",
    }
    return kinds.get(stat.S_IFMT(mode), "regular file")


def _existing(path: Path) -> os.stat_result | None:
    """Return the status of ``path``, links followed, or None if there is nothing.

    Raises:
        OSError: It cannot be written.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    if not (
        stat.S_ISREG(found.st_mode) or stat.S_ISFIFO(found.st_mode) or stat.S_ISCHR(found.st_mode)
    ):
        raise OSError(errno.EINVAL, f"it is a {kind(found.st_mode)}")
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return found


def _through(path: Path, found: os.stat_result) -> Path | int | None:
    """Return what to open, a path or a descriptor, where bytes must be written through what is
    there; None for a regular file, which can be replaced."""
    stream = _standard_stream(found)
    if stream is not None:
        return os.dup(stream)  # the end of a redirected stream's file, which `open` would cut off
    return None if stat.S_ISREG(found.st_mode) else path


def _standard_stream(found: os.stat_result) -> int | None:
    """Return 1 or 2 if standard output or standard error is the same file or pipe."""
    for stream in (1, 2):
        with suppress(OSError):
            if not stat.S_ISCHR(found.st_mode) and os.path.samestat(found, os.fstat(stream)):
                return stream
    return None


def _replace(
    target: Path,
    workspace: Path,
    found: os.stat_result | None,
    fill: Callable[[BinaryIO], object],
) -> None:
    """Write a file in `workspace`, then give it the name `target`."""
    # short, since names have a limit
    temporary = workspace / _TEMPORARY.replace("*", secrets.token_hex(8))
    with _unwinding():
        try:
            # A new file gets the rights that the umask leaves; one with rights to keep is private
            # until then.
            rights = 0o666 if found is None else 0o600
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, rights)
            mode = (os.fstat(descriptor) if found is None else found).st_mode & 0o777
            with open(temporary, "wb", opener=lambda *_: descriptor) as file:
                fill(file)
            with open(temporary, "rb") as file:  # which `fill` may have replaced, given its name
                if found is not None:
                    with suppress(PermissionError):  # only root may give files away
                        os.fchown(file.fileno(), found.st_uid, found.st_gid)
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise


class _Ended(BaseException):
    """A signal that ends the process has come; args[0] is its number."""


@contextmanager
def _unwinding() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the stack of the block, so that it can clean up, before they
    end the process.

    Only the main thread can do that; in another one the signals end the process at once, as ever.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def unwind(number: int, frame: object) -> None:
        raise _Ended(number)

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_DFL]
    ended = None
    try:
        for number in numbers:
            signal.signal(number, unwind)
        yield
    except _Ended as end:
        ended = end.args[0]
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
    if ended is not None:
        signal.raise_signal(ended)


def checksum(t: Tensor) -> int:
    """CRC-32 of a contiguous tensor's bytes."""
    return zlib.crc32(t.flatten().view(torch.uint8).numpy().data)


def checksums(tensors: Iterable[object]) -> int:
    """CRC-32 of the bytes of all tensors among some objects, such as the values of a state_dict."""
    total = 0
    for t in tensors:
        if isinstance(t, Tensor):
            own = checksum(t.detach().cpu().contiguous())
            total = zlib.crc32(own.to_bytes(4, "little"), total)
    return total


def refuse_another(
    path: Path, kind: str, saved: Mapping[str, object], given: Mapping[str, object]
) -> None:
    """Raises FileError if what is in a file, of this kind, was made by another configuration."""
    for key in {**given, **saved}:
        old, new = (c.get(key, "nothing") for c in (saved, given))
        if old != new:
            raise FileError(
                f"{path}: {kind} of another configuration: {key}: {old} there, {new} here: delete "
                "it, or name another file"
            )


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of an exception's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
