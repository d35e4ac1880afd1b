"""Clouds in files that the benchmark makes: real blocks on a disk, in the page cache or not."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dfkernels.methods.sharded import write_manifest

BLOCK = 1 << 24  # bytes that are written together
READ = 1 << 20  # bytes that are read together: they stay in the cache of a core
HIGHEST = 256  # uint8 atoms are uniform on 1 to 255


def expect_room(folder: Path, size: int) -> None:
    """Ends the program where the disk has not so many bytes, and another GiB, left."""
    free, needed = shutil.disk_usage(folder).free, size + (1 << 30)
    if free < needed:
        sys.exit(f"{folder}: needs {needed:,} bytes, and {free:,} are free")


def make(folder: Path, N: int, d: int, files: int, dtype: str = "uint8") -> list[Path]:
    """Writes N atoms of d numbers into `files` files as equal as can be, with a manifest."""
    itemsize = np.dtype(dtype).itemsize
    folder.mkdir(exist_ok=True)
    expect_room(folder, N * d * itemsize)
    generator, paths = np.random.default_rng(0), []
    for i in range(files):
        rows = (i + 1) * N // files - i * N // files
        path = folder / f"part{i}.npy"
        with path.open("wb") as file:
            head = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (rows, d)}
            np.lib.format.write_array_header_1_0(file, head)
            for start in range(0, rows * d, BLOCK):
                count = min(BLOCK, rows * d - start)
                numbers = generator.integers(1, HIGHEST, count, np.uint8)
                file.write(numbers.astype(dtype, copy=False).data)
            file.flush()
            os.fsync(file.fileno())
        if os.stat(path).st_blocks * 512 < rows * d * itemsize:
            sys.exit(f"{path}: is sparse or compressed: a disk that stores all of it is needed")
        paths.append(path)
    write_manifest(folder)
    return paths


def drop(paths: Iterable[Path]) -> None:
    """Asks the system to forget what it holds of the files in memory."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_memory(paths: Iterable[Path]) -> float:
    """The share of the files, by samples, that the page cache holds; NaN where the file system does
    not say."""
    found = []
    for path in paths:
        with path.open("rb") as file:
            size, byte = os.stat(path).st_size, bytearray(1)
            for k in range(8):
                try:
                    os.preadv(file.fileno(), [byte], size * k // 8, os.RWF_NOWAIT)
                    found.append(True)
                except BlockingIOError:
                    found.append(False)
                except OSError:
                    return math.nan
    return sum(found) / len(found)


def sequential(paths: Iterable[Path]) -> float:
    """Seconds to read the files from end to end, by one thread and block by block."""
    buffer = memoryview(bytearray(READ))
    start = time.perf_counter()
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start
