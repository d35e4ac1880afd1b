"""A .npy file that has its space on the disk from the beginning and is filled by rows."""

from __future__ import annotations

import io
import math
import os
import zlib
from pathlib import Path

import numpy as np

from .files import FileError

__all__ = ["ReservedArray"]

_BLOCK = 1 << 24  # bytes that are looked at together


class ReservedArray:
    """An array in a file, whose first rows are written. Its header comes last: until `seal` nobody
    reads it as an array.

    Args:
        path: The file.
        shape, dtype: Of the whole array, [n, ...] with n >= 1.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype
        self.row_bytes = math.prod(shape[1:]) * dtype.itemsize
        text = io.BytesIO()
        held = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(text, {**held, "shape": shape})
        self._header = text.getvalue()
        self._file = -1

    @property
    def bytes(self) -> int:
        """Of the whole file."""
        return len(self._header) + self.shape[0] * self.row_bytes

    def create(self) -> None:
        """Makes the file anew, with its space. Raises OSError."""
        self.path.unlink(missing_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        os.posix_fallocate(self._file, 0, self.bytes)

    def open(self, rows: int, crc32: int) -> None:
        """Opens a file that is there, whose first rows have this checksum.

        Raises:
            FileError: It is missing, of another size, or damaged.
            OSError: It cannot be read or written.
        """
        try:
            self._file = os.open(self.path, os.O_RDWR)
        except FileNotFoundError:
            raise FileError(f"{self.path}: no such file") from None
        size = os.fstat(self._file).st_size
        if size != self.bytes:
            raise FileError(f"{self.path}: has {size} bytes, and should have {self.bytes}")
        found, at = 0, len(self._header)
        end = at + rows * self.row_bytes
        while at < end:
            block = os.pread(self._file, min(_BLOCK, end - at), at)
            if not block:
                raise FileError(f"{self.path}: has become shorter")
            found, at = zlib.crc32(block, found), at + len(block)
        if found != crc32:
            raise FileError(
                f"{self.path}: damaged: the checksum of the first {rows} rows is {found}, not "
                f"{crc32}"
            )

    def write(self, first: int, rows: np.ndarray, crc32: int) -> int:
        """Writes rows from row `first` on; returns the checksum of all rows up to them, which
        before was `crc32`. Raises OSError.
        """
        expected = self.shape[1:]
        if rows.dtype != self.dtype or rows.shape[1:] != expected:
            raise TypeError(f"{self.path}: {self.dtype} {expected}, got {rows.dtype} {rows.shape}")
        data = np.ascontiguousarray(rows).data.cast("B")
        at, done = len(self._header) + first * self.row_bytes, 0
        while done < len(data):
            done += os.pwrite(self._file, data[done:], at + done)
        return zlib.crc32(data, crc32)

    def sync(self) -> None:
        """Waits until what was written is on the disk. Raises OSError."""
        os.fsync(self._file)

    def seal(self) -> None:
        """Writes the header, with which the file is a .npy file. Raises OSError."""
        os.pwrite(self._file, self._header, 0)
        os.fsync(self._file)

    def mapped(self) -> np.ndarray:
        """The array, memory-mapped, to read. Raises OSError."""
        return np.memmap(self.path, self.dtype, "r", len(self._header), self.shape)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
