"""Rows of an array in a .npy or .safetensors file, read into memory that is there already.

A memory map would end the process where a file is cut off while it is read, and what it holds in
memory is not ours to say.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._torch import dtypes, words
from . import files, tensor_files
from .files import FileError

__all__ = ["Located", "gather", "locate", "read"]

_NPY = {
    np.dtype(name): dtype
    for name, dtype in dtypes.STORED_BY_NAME.items()
    if dtype != torch.bfloat16
}


class Located(NamedTuple):
    """An array of rows in a file."""

    path: Path
    key: str | None
    begin: int  # its first byte
    shape: torch.Size
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """FILE or FILE:KEY."""
        return str(self.path) if self.key is None else f"{self.path}:{self.key}"

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def kind(self) -> str:
        """What one row is, for a message."""
        return f"rows {list(self.shape[1:])} in {words.dtype(self.dtype)}"


def locate(path: Path, key: str | None) -> Located:
    """Finds an array of rows by the header of its file.

    Args:
        path: A .npy or .safetensors file.
        key: The array's name in a .safetensors file; None where it holds one only, and of .npy.

    Raises:
        FileError: No such file or key, a damaged or truncated file, or no dense rows of a dtype
            that atoms can have.
    """
    try:
        os.stat(path)
        if path.suffix.lower() == ".npy" and key is not None:
            raise FileError(f"{path}: holds one array without a name: expected no key, got {key!r}")
        found = _npy(path) if path.suffix.lower() == ".npy" else _safetensors(path, key)
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{path}: cannot read: {error.strerror or error}") from None
    except Exception as error:  # parsers of damaged files raise whatever comes to their mind
        raise FileError(f"{path}: truncated or unreadable: {files.first_sentence(error)}") from None
    if found.dtype not in dtypes.STORED:
        raise FileError(
            f"{found.name}: expected {dtypes.STORED_IN_WORDS}, got {words.dtype(found.dtype)}"
        )
    if len(found.shape) < 1 or not math.prod(found.shape):
        raise FileError(
            f"{found.name}: expected rows [n, *E] with n >= 1, got shape {list(found.shape)}"
        )
    return found


def read(at: Located, first: int, last: int, into: np.ndarray) -> Tensor:
    """Rows first to last - 1 as a tensor on `into`, bytes that are at least as many.

    Raises:
        FileError: The file cannot be read, or has become shorter.
    """
    _fill(at, [(first, last)], into)
    return _shaped(at, last - first, into)


def gather(at: Located, numbers: Tensor) -> Tensor:
    """The rows of these numbers, int64 [m], rising, as a tensor [m, *E] of its own; neighbours are
    read together.

    Raises:
        FileError: As `read`.
    """
    begins = numbers[numbers.diff(prepend=numbers[:1] - 2) != 1]
    ends = numbers[numbers.diff(append=numbers[-1:] + 2) != 1] + 1
    into = np.empty(len(numbers) * at.row_bytes, np.uint8)
    _fill(at, list(zip(begins.tolist(), ends.tolist(), strict=True)), into)
    return _shaped(at, len(numbers), into)


def _fill(at: Located, runs: list[tuple[int, int]], into: np.ndarray) -> None:
    """Reads rows first to last - 1 of each run, one run after the other."""
    done = 0
    try:
        with open(at.path, "rb", buffering=0) as file:
            for first, last in runs:
                file.seek(at.begin + first * at.row_bytes)
                end = done + (last - first) * at.row_bytes
                while done < end:
                    count = file.readinto(into.data[done:end])
                    if not count:
                        raise FileError(f"{at.path}: truncated: it ends before row {last - 1} does")
                    done += count
    except OSError as error:
        raise FileError(f"{at.path}: cannot read: {error.strerror or error}") from None


def _shaped(at: Located, count: int, held: np.ndarray) -> Tensor:
    flat = torch.from_numpy(held[: count * at.row_bytes]).view(at.dtype)
    return flat.view(count, *at.shape[1:])


def _npy(path: Path) -> Located:
    array = np.lib.format.open_memmap(path, mode="r")  # refuses pickled objects
    assert isinstance(array, np.memmap)
    if array.dtype not in _NPY or not array.dtype.isnative or not array.flags.c_contiguous:
        order = "" if array.flags.c_contiguous else " in Fortran's order"
        raise FileError(
            f"{path}: expected rows one after the other in float64, float32, float16 or uint8 of "
            f"this machine's byte order, got {array.dtype}{order}"
        )
    return Located(path, None, array.offset, torch.Size(array.shape), _NPY[array.dtype])


def _safetensors(path: Path, key: str | None) -> Located:
    held, _ = tensor_files.locate(path)
    if key is None and len(held) == 1:
        (key,) = held
    if key is None or key not in held:
        names = ", ".join(list(held)[:12]) + (", ..." if len(held) > 12 else "")
        wanted = "name one as key" if key is None else f"none of them named {key}"
        raise FileError(f"{path}: holds {len(held)} arrays ({names}): {wanted}")
    place = held[key]
    return Located(path, key, place.begin, torch.Size(place.shape), place.dtype(path, key))
