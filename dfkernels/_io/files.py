"""Results to files, whole or not at all; .safetensors files, read without trusting them."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import secrets
import signal
import stat
import tempfile
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor


class FileError(ValueError):
    """A file that cannot be read or written, or holds the wrong thing; the message starts with its
    name."""


# ---- writing


def write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Write `path` by `fill(file)`, whole or not at all: any failure or signal leaves what was
    there before.

    A regular file is written beside its place and then renamed, with the owner and the rights of
    the file that it replaces; of several hard links only this name is replaced. A symbolic link
    stays one, and what it points to is written. A FIFO or a character device takes the bytes and
    stays what it is.

    Raises FileError (full disk, no permission, no such folder, a directory or another thing that is
    no file).
    """
    try:
        found = _existing(path)
        through = None if found is None else _through(path, found)
        if through is None:
            _replace(Path(os.path.realpath(path)), found, fill)
            return
        buffer = io.BytesIO()  # what `fill` writes may need a file in which one can go back
        fill(buffer)
        with open(through, "wb") as file:
            file.write(buffer.getbuffer())
    except OSError as error:
        raise FileError(f"{path}: cannot write: {error.strerror or error}") from None


def prepare(path: Path) -> None:
    """Make the folder of `path`, and see before any work that `path` can be written. Raises
    FileError."""
    try:
        found = _existing(path)
    except OSError as error:
        raise FileError(f"{path}: cannot write: {error.strerror or error}") from None
    if found is None or (stat.S_ISREG(found.st_mode) and _standard_stream(found) is None):
        folder(Path(os.path.realpath(path)).parent)


def folder(path: Path) -> Path:
    """`path`, made if missing and seen to be writable. Raises FileError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise FileError(f"{path}: cannot write there: {error.strerror or error}") from None


def is_standard_output(path: Path) -> bool:
    """Whether what is written to `path` goes where print does, as with /dev/stdout."""
    try:
        return _standard_stream(os.stat(path)) == 1
    except OSError:
        return False


def is_same(path: Path, other: Path) -> bool:
    """Whether two names, links followed, are those of one existing file."""
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False


def kind(mode: int) -> str:
    """In words, what kind of thing has this st_mode."""
    kinds = {
        stat.S_IFDIR: "directory",
        stat.S_IFIFO: "FIFO",
        stat.S_IFSOCK: "socket",
        stat.S_IFCHR: "character device",
        stat.S_IFBLK: "block device",
    }
    return kinds.get(stat.S_IFMT(mode), "regular file")


def _existing(path: Path) -> os.stat_result | None:
    """What `path` is now, links followed; None if there is nothing. Raises OSError if it cannot be
    written."""
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
    """What to open, a path or a descriptor, where bytes go through; None for a file that can be
    replaced."""
    stream = _standard_stream(found)
    if stream is not None:
        return os.dup(stream)  # the end of a redirected stream's file, which `open` would cut off
    return None if stat.S_ISREG(found.st_mode) else path


def _standard_stream(found: os.stat_result) -> int | None:
    """1 or 2 where that is the descriptor of the same file or pipe."""
    for stream in (1, 2):
        with suppress(OSError):
            if not stat.S_ISCHR(found.st_mode) and os.path.samestat(found, os.fstat(stream)):
                return stream
    return None


def _replace(
    target: Path, found: os.stat_result | None, fill: Callable[[BinaryIO], object]
) -> None:
    """Write a file beside `target`, then give it that name."""
    temporary = target.with_name(
        f".dfkernels-{secrets.token_hex(8)}.tmp"
    )  # short, since names have a limit
    with _unwinding():
        try:
            # A new file gets the rights that the umask leaves; one with rights to keep is private
            # until then.
            rights = 0o666 if found is None else 0o600
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, rights)
            with open(descriptor, "wb") as file:
                if found is not None:
                    with suppress(PermissionError):  # only root may give files away
                        os.fchown(descriptor, found.st_uid, found.st_gid)
                    os.fchmod(descriptor, found.st_mode & 0o777)
                fill(file)
                file.flush()
                os.fsync(descriptor)
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise


class _Ended(BaseException):
    """A signal that ends the process has come; args[0] is its number."""


@contextmanager
def _unwinding() -> Iterator[None]:
    """SIGTERM and SIGHUP, where they would end the process at once, first unwind the stack of what
    is inside, so that it can clean up; then they end the process.

    Only the main thread can do that; in another one they end the process as ever.
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


# ---- .safetensors

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the format's own readers


class Entry(NamedTuple):
    """Where a tensor lies in a .safetensors file."""

    name: str
    dtype: str  # as the format calls it
    shape: list[int]
    begin: int  # bytes from the start of the file
    end: int


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A .safetensors file, whole or not at all; every tensor at a multiple of 64 bytes, with its
    checksum."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    arrays = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    header, end = {"__metadata__": metadata | {"crc32": json.dumps(_checksums(arrays))}}, 0
    for name, t in arrays.items():
        begin, end = end, end + t.numel() * t.element_size()
        header[name] = {
            "dtype": names[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)

    def fill(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for t in arrays.values():
            file.write(_bytes(t))

    write(path, fill)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `save_tensors` wrote, memory-mapped, checksums compared.

    Writing to a tensor leaves the file as it is. Raises FileError.
    """
    if not path.is_file():
        raise FileError(f"{path}: no such file")
    try:
        entries, metadata = safetensors_header(path)
        arrays = {name: mapped(path, entry, writable=True) for name, entry in entries.items()}
        checksums = dict(json.loads(metadata["crc32"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise FileError(f"{path}: truncated or unreadable: {first_sentence(error)}") from None
    for name, found in _checksums(arrays).items():
        if found != checksums.get(name):
            raise FileError(
                f"{path}: damaged: the checksum of {name} is {found}, not {checksums.get(name)}"
            )
    return arrays, metadata


def safetensors_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """(tensors, metadata) of a file: header length (uint64, little endian), JSON {name: {dtype,
    shape, data_offsets}}, tensor bytes.

    Raises ValueError unless each tensor has its own bytes of the file, as many as its dtype and
    shape need.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"the header needs {length} bytes, the file has {size}")
        if length > _LONGEST_HEADER:
            raise ValueError(f"the header has {length} bytes, the format allows {_LONGEST_HEADER}")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
        except RecursionError:
            raise ValueError("the header is nested too deeply") from None
    if not isinstance(header, dict):
        raise ValueError(f"the header is a {type(header).__name__}, no object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ValueError("the header's metadata are no object")
    entries = {name: _entry(name, given, 8 + length, size) for name, given in header.items()}
    last = 0
    for entry in sorted(entries.values(), key=lambda e: (e.begin, e.end)):
        if entry.begin < last and entry.end > entry.begin:
            raise ValueError(f"tensor {entry.name} overlaps another one")
        last = max(last, entry.end)
    return entries, metadata


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("the header has a name twice")
    return found


def _entry(name: str, given: object, start: int, size: int) -> Entry:
    """One tensor of a header, checked; `start` is where the tensors' bytes begin, `size` that of
    the file."""
    given = given if isinstance(given, dict) else {}
    dtype, shape, offsets = (given.get(k) for k in ("dtype", "shape", "data_offsets"))
    if (
        not isinstance(dtype, str)
        or not _counts(shape)
        or not _counts(offsets)
        or len(offsets) != 2
    ):
        raise ValueError(f"tensor {name} has no dtype, shape [...] and data_offsets [begin, end]")
    begin, end = offsets
    known = _DTYPES.get(dtype)
    needs = None if known is None else math.prod(shape) * known.itemsize
    if not begin <= end <= size - start or needs not in (None, end - begin):
        raise ValueError(
            f"tensor {name} {shape} needs bytes {begin} to {end}, the file ends at {size - start}"
        )
    return Entry(name, dtype, shape, start + begin, start + end)


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def mapped(path: Path, entry: Entry, *, writable: bool) -> Tensor:
    """A tensor of a .safetensors file, memory-mapped.

    `writable`: it may be written to, and the file stays as it is; else it must not be written to,
    and may be larger than the memory. Raises FileError for a dtype that torch does not have.
    """
    dtype = _DTYPES.get(entry.dtype)
    if dtype is None:
        raise FileError(
            f"{path}: tensor {entry.name} has dtype {entry.dtype}, expected one of"
            f" {', '.join(_DTYPES)}"
        )
    if entry.end == entry.begin:
        return torch.empty(entry.shape, dtype=dtype, device="cpu")
    raw = np.memmap(
        path,
        np.uint8,
        "c" if writable else "r",
        offset=entry.begin,
        shape=(entry.end - entry.begin,),
    )
    if raw.ctypes.data % dtype.itemsize:
        raw = np.array(raw)  # the format does not promise alignment
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(raw).view(dtype).view(entry.shape)


def checksum(t: Tensor) -> int:
    """CRC-32 of a contiguous tensor's bytes."""
    return zlib.crc32(_bytes(t))


def _bytes(t: Tensor) -> memoryview:
    return memoryview(t.flatten().view(torch.uint8).numpy())


def _checksums(arrays: dict[str, Tensor]) -> dict[str, int]:
    return {name: checksum(t) for name, t in arrays.items()}


def first_sentence(error: BaseException) -> str:
    """What an exception says, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
