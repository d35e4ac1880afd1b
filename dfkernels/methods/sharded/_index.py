"""The indexes of the files of a cloud, each beside its file."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..._io import arrays, files
from ..._io.files import FileError
from ...certified import build, index_file
from ...certified.rounding import FEW_ROUNDINGS
from ...certified.stored_index import StoredIndex
from ...ops.common.moments import load
from .._shards import stamp
from ._files import Files

__all__ = ["Indexes", "path_of", "write_indexes"]

_LEAST_BYTES = 32  # of an atom: shorter ones are read as fast as an index


def path_of(held: Files, i: int) -> Path:
    """The index of a file: FILE.index."""
    path = held.arrays[i].path
    return path.with_name(f"{path.name}.index")


def write_indexes(held: Files, seed: int, report: Callable[[int, int], None]) -> None:
    """Builds the indexes that are missing, and checks the others. report(rows, all rows).

    Raises:
        FileError: An index is damaged or of other rows; a file has changed since the manifest was
            written; or an index cannot be written.
        ValueError: Atoms that cannot have an index.
    """
    check_row(held)
    done, count = 0, sum(held.sizes)
    for i, at in enumerate(held.arrays):
        path, atoms = path_of(held, i), _fingerprint(held, i)
        if path.exists():
            index_file.load_index(path, atoms)
        else:
            flat = arrays.load(at.name).reshape(at.shape[0], -1)  # a memory map
            if (crc := files.checksum(flat)) != held.manifest.shards[i].crc32:
                held.refuse(i, crc)
            scale, offset = held.manifest.scale, held.manifest.offset
            try:
                made = build.build_index(flat, scale, offset, seed)
            except ValueError as error:
                raise FileError(f"{at.name}: {error}") from None
            index_file.save_index(path, made, atoms)
        done += at.shape[0]
        report(done, count)


def check_row(held: Files) -> None:
    """Raises ValueError where the rows are too short for an index."""
    if held.row_bytes < _LEAST_BYTES:
        d = math.prod(held.manifest.event_shape)
        raise ValueError(
            f"index: expected atoms of at least {_LEAST_BYTES} bytes, got {held.row_bytes} "
            f"(d = {d}, {held.arrays[0].dtype}): these are read as fast as an index"
        )


class Indexes:
    """The indexes of all files, opened when they are first asked for."""

    def __init__(self, held: Files) -> None:
        self._held = held
        self.sizes = held.sizes
        ends = list(itertools.accumulate(held.sizes))
        self.starts = [0, *ends[:-1]]  # the numbers of the files' first atoms in all files
        self._opened: dict[int, tuple[StoredIndex, tuple[int, int]]] = {}
        self._checked: set[int] = set()
        self._ball: tuple[Tensor, Tensor] | None = None

    def missing(self) -> Path | None:
        """The first index that is not there; None where all are."""
        paths = (path_of(self._held, i) for i in range(len(self._held.arrays)))
        return next((path for path in paths if not path.exists()), None)

    def of(self, i: int) -> StoredIndex:
        """The index of a file, whose first level has been checked.

        Raises:
            FileError: It is damaged, of other rows, or has changed since it was opened.
        """
        path = path_of(self._held, i)
        seen = stamp(path)
        if i not in self._opened:
            self._opened[i] = StoredIndex(path, _fingerprint(self._held, i)), seen
        index, before = self._opened[i]
        if seen != before:
            raise FileError(f"{path}: has changed since the cloud was opened: open it anew")
        if i not in self._checked:
            index.check()
            self._checked.add(i)
        return index

    def rows(self, i: int, atoms: Tensor) -> Tensor:
        """Atoms of a file as they are stored, int64 [m], rising, -> [m, *E]."""
        return self._held.gather(i, atoms)

    def values(self, numbers: Tensor) -> Tensor:
        """Atoms by their numbers in all files, int64 [m], rising, -> [m, d] in float64."""
        manifest = self._held.manifest
        starts = torch.tensor(self.starts, dtype=torch.int64, device="cpu")
        of = torch.searchsorted(starts, numbers, right=True) - 1
        found = [
            self.rows(i, numbers[of == i] - self.starts[i]).flatten(1) for i in of.unique().tolist()
        ]
        return load(torch.cat(found), torch.float64, manifest.scale, manifest.offset)

    def ball(self) -> tuple[Tensor, Tensor]:
        """A centre [d] and a radius: a ball with all atoms in it but for remote ones, which are
        counted as in docs/certified.md."""
        if self._ball is None:
            numbers = range(len(self._held.arrays))
            total = sum(self.of(i).without_atoms().centre.double() for i in numbers)
            centre = torch.as_tensor(total) / len(numbers)
            radius = centre.new_zeros(())
            for i in numbers:
                index = self.of(i).without_atoms()
                apart = (index.centre.double() - centre).norm() * FEW_ROUNDINGS
                radius = torch.maximum(radius, apart + index.named_limits.radius)
            self._ball = centre, radius
        return self._ball


def _fingerprint(held: Files, i: int) -> str:
    at, manifest = held.arrays[i], held.manifest
    shape = at.shape[0], math.prod(at.shape[1:])
    crc = manifest.shards[i].crc32
    return index_file.described(shape, at.dtype, manifest.scale, manifest.offset, crc)
