"""Folders of rows in files, shard by shard, as encoders leave them."""

from __future__ import annotations

import itertools
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from .._io.files import FileError

__all__ = ["of_folder", "stamp", "written"]

_SUFFIXES = (".safetensors", ".npy")
_SHARD = re.compile(r"latents_rank(\d+)_shard(\d+)\.safetensors")


def of_folder(path: Path) -> list[Path]:
    """The files of a folder, in the order of the numbers in their names, or the one file, that
    `path` names: .safetensors files or else .npy files.

    Raises:
        FileError: There are none, or a shard is missing in the numbering.
    """
    if not path.exists():
        raise FileError(f"{path}: no such file or folder")
    expected = f"expected {' or '.join(_SUFFIXES)} files"
    if not path.is_dir():
        if path.suffix.lower() not in _SUFFIXES:
            raise FileError(f"{path}: {expected}, got {path.suffix or 'no suffix'}")
        return [path]
    try:
        held = sorted(path.iterdir(), key=_by_number)
    except OSError as error:
        raise FileError(f"{path}: cannot read: {error.strerror or error}") from None
    for suffix in _SUFFIXES:
        found = [file for file in held if file.suffix.lower() == suffix]
        if found:
            _check_numbering(path, found)
            return found
    what = f"a folder of {len(held)} others" if held else "an empty folder"
    raise FileError(f"{path}: {expected}, got {what}")


def stamp(file: Path) -> tuple[int, int]:
    """What changes with a file: time and size. Raises FileError."""
    try:
        found = os.stat(file)
    except OSError as error:
        raise FileError(f"{file}: cannot read: {error.strerror or error}") from None
    return found.st_mtime_ns, found.st_size


def written(array: Tensor) -> int:
    """The number of rows up to the last one that is not all zeros."""
    n = len(array)
    while n and not bool(array[n - 1].any()):
        n -= 1
    return n


def _by_number(file: Path) -> list[str | int]:
    """Sorts shard2 before shard10."""
    parts = re.split(r"(\d+)", file.name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def _check_numbering(folder: Path, found: list[Path]) -> None:
    """Raises FileError for a shard that is missing before the last one of its rank, or a rank
    before the last.
    """
    shards: dict[int, set[int]] = {}
    for file in found:
        if named := _SHARD.fullmatch(file.name):
            shards.setdefault(int(named[1]), set()).add(int(named[2]))
    if missing := list(itertools.islice(_missing(shards), 4)):
        more = ", ..." if len(missing) > 3 else ""
        raise FileError(
            f"{folder}: expected shards without gaps in their numbers, got no "
            f"{', '.join(missing[:3])}{more}"
        )
    if not shards:
        return
    fewest, most = (f(shards, key=lambda rank: len(shards[rank])) for f in (min, max))
    if len(shards[fewest]) < len(shards[most]):
        warnings.warn(
            f"{folder}: rank {fewest} has {len(shards[fewest])} shards, rank {most} has "
            f"{len(shards[most])}: the last ones of rank {fewest} may be missing",
            RuntimeWarning,
            stacklevel=4,
        )


def _missing(shards: dict[int, set[int]]) -> Iterator[str]:
    for rank in range(max(shards, default=-1) + 1):
        there = shards.get(rank, set())
        for shard in range(max(there, default=0) + 1):
            if shard not in there:
                yield f"latents_rank{rank:02d}_shard{shard:03d}.safetensors"
