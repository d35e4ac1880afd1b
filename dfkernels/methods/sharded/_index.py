"""The indexes of the files of a cloud, each beside its file."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..._io import arrays, files
from ..._io.files import FileError
from ...certified import build, index_file
from ...certified.index import unindexable
from ...certified.rounding import FEW_ROUNDINGS
from ...certified.stored_index import StoredIndex
from .._shards import stamp
from ._files import Files
from ._manifest import Numbers

__all__ = ["Indexes", "path_of", "too_short", "write_indexes"]


def path_of(held: Files, i: int) -> Path:
    """The index of a file: FILE.index."""
    path = held.arrays[i].path
    return path.with_name(f"{path.name}.index")


def write_indexes(
    held: Files, scale: Numbers, offset: Numbers, seed: int, report: Callable[[int, int], None]
) -> None:
    """Builds the indexes that are missing, and checks the others. report(rows, all rows).

    Raises:
        FileError: An index is damaged or of other rows; a file has changed since the manifest was
            written; or an index cannot be written.
        ValueError: Atoms that cannot have an index.
    """
    if (why := too_short(held)) is not None:
        raise ValueError(f"index: {why}")
    event = torch.Size(held.manifest.event_shape)
    by, plus = _of_numbers(scale, event), _of_numbers(offset, event)
    done, count = 0, sum(held.sizes)
    for i, at in held.arrays.items():
        path, atoms = path_of(held, i), _fingerprint(held, i, scale, offset)
        if path.exists():
            index_file.load_index(path, atoms)
        else:
            flat = arrays.load(at.name).reshape(at.shape[0], -1)  # a memory map
            if (crc := files.checksum(flat)) != held.manifest.shards[i].crc32:
                held.refuse(i, crc)
            try:
                made = build.build_index(flat, by, plus, seed)
            except ValueError as error:
                raise FileError(f"{at.name}: {error}") from None
            index_file.save_index(path, made, atoms)
        done += at.shape[0]
        report(done, count)


def too_short(held: Files) -> str | None:
    """Why rows are too short for an index; None where they are not."""
    return unindexable(math.prod(held.manifest.event_shape), held.dtype)


class Indexes:
    """The indexes of all files, opened when they are first asked for, of atoms that are
    scale * row + offset.
    """

    def __init__(self, held: Files, scale: Numbers, offset: Numbers) -> None:
        self.files, self.sizes, self.starts = held, held.sizes, held.starts
        self._numbers = scale, offset
        self._opened: dict[int, tuple[StoredIndex, tuple[int, int]]] = {}
        self._checked: set[int] = set()
        self._ball: tuple[Tensor, Tensor] | None = None

    def missing(self) -> Path | None:
        """The first index that is not there; None where all are."""
        paths = (path_of(self.files, i) for i in range(len(self.sizes)))
        return next((path for path in paths if not path.exists()), None)

    def of(self, i: int) -> StoredIndex:
        """The index of a file, whose first level has been checked.

        Raises:
            FileError: It is damaged, of other rows, or has changed since it was opened.
        """
        path = path_of(self.files, i)
        seen = stamp(path)
        if i not in self._opened:
            self._opened[i] = StoredIndex(path, _fingerprint(self.files, i, *self._numbers)), seen
        index, before = self._opened[i]
        if seen != before:
            raise FileError(f"{path}: has changed since the cloud was opened: open it anew")
        if i not in self._checked:
            index.check()
            self._checked.add(i)
        return index

    def values(self, numbers: Tensor) -> Tensor:
        """Atoms by their numbers in all files, int64 [m], -> [m, d] in float64."""
        y = self.files.rows(numbers).flatten(1).double()
        event = torch.Size(self.files.manifest.event_shape)
        scale, offset = (_of_numbers(n, event) for n in self._numbers)
        return y * scale + offset

    def ball(self) -> tuple[Tensor, Tensor]:
        """A centre [d] and a radius: a ball with all atoms in it but for remote ones, which are
        counted as in docs/certified.md."""
        if self._ball is None:
            numbers = range(len(self.sizes))
            centres = [self.of(i).without_atoms().centre.double() / len(numbers) for i in numbers]
            centre = functools.reduce(torch.add, centres)
            radius = centre.new_zeros(())
            for i in numbers:
                index = self.of(i).without_atoms()
                apart = (index.centre.double() - centre).norm() * FEW_ROUNDINGS
                radius = torch.maximum(radius, apart + index.named_limits.radius)
            self._ball = centre, radius
        return self._ball


def _fingerprint(held: Files, i: int, scale: Numbers, offset: Numbers) -> str:
    at = held.arrays[i]
    shape = at.shape[0], math.prod(at.shape[1:])
    return index_file.described(shape, at.dtype, scale, offset, held.manifest.shards[i].crc32)


def _of_numbers(numbers: Numbers, event: torch.Size) -> float | Tensor:
    """A number, or those of the channels for each number of an atom, [d] in float64."""
    if isinstance(numbers, float):
        return numbers
    each = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    return each.repeat_interleave(math.prod(event[1:]))
