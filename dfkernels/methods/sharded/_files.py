"""The files of a manifest as they were opened, and their rows, block by block."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from ..._io import rows
from ..._io.files import FileError
from ..._torch import check, dtypes
from .._ranks import Ranks, owners
from .._shards import stamp
from . import _manifest

__all__ = ["Block", "Files", "numbers_of"]


class Block(NamedTuple):
    """Rows of a file that are read together."""

    file: int
    first: int
    last: int


class Files:
    """The files that a manifest lists. Those that this rank reads are there; their contents are
    checked while they are read.

    Args:
        folder: With a manifest.
        ranks: Who share the files out.

    Raises:
        FileError: A file or the manifest is wrong.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        if not folder.is_dir():
            raise FileError(f"{folder}: expected a folder with a {_manifest.NAME}")
        self.manifest = _manifest.load(folder / _manifest.NAME)
        self.crc32 = zlib.crc32(repr(self.manifest).encode())
        self.ranks = ranks
        self.sizes = [shard.rows for shard in self.manifest.shards]
        ends = list(itertools.accumulate(self.sizes))
        self._ends = torch.tensor(ends, dtype=torch.int64, device="cpu")
        self.starts = [0, *ends[:-1]]  # the numbers of the files' first rows in all files
        self.owner = owners(self.sizes, ranks.size)
        self.own = ranks.share(range(len(self.sizes)), self.owner)
        self.arrays = self.manifest.located(folder, self.own)
        self._stamps = {i: stamp(at.path) for i, at in self.arrays.items()}
        self._trusted = {
            i: seen[0] == self.manifest.shards[i].mtime_ns for i, seen in self._stamps.items()
        }

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows."""
        return dtypes.STORED_BY_NAME[self.manifest.dtype]

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return math.prod(self.manifest.event_shape) * self.dtype.itemsize

    def blocks(
        self, numbers: Sequence[int], count: int, pinned: bool = False
    ) -> Iterator[tuple[Block, Tensor]]:
        """The rows of some files in order, at most `count` together; the next ones are read
        meanwhile. A block's memory is used again after the next one was asked for. Where it is
        pinned, a GPU copies from it at the rate of the bus.

        Raises:
            FileError: A file has changed, or cannot be read.
        """
        tasks = [
            Block(i, first, min(first + count, self.sizes[i]))
            for i in numbers
            for first in range(0, self.sizes[i], count)
        ]
        if not tasks:
            return
        largest = max(task.last - task.first for task in tasks) * self.row_bytes
        bytes_of = {"dtype": torch.uint8, "device": "cpu", "pin_memory": pinned}
        buffers = [torch.empty(largest, **bytes_of).numpy() for _ in range(2)]
        sums: dict[int, int] = {}  # running checksums, by file
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self._read, tasks[0], buffers[0], sums)
            for i, task in enumerate(tasks):
                y = ahead.result()
                if i + 1 < len(tasks):
                    ahead = reader.submit(self._read, tasks[i + 1], buffers[(i + 1) % 2], sums)
                yield task, y

    def rows(self, numbers: Tensor) -> Tensor:
        """Rows by their numbers in all files together, [n] -> [n, *E], in this rank's files.

        Raises:
            FileError: A file has changed, or cannot be read.
        """
        distinct, place = numbers.cpu().unique(return_inverse=True)
        files = torch.searchsorted(self._ends, distinct, right=True)
        shape = (0, *self.manifest.event_shape)
        found = [torch.empty(shape, dtype=self.dtype, device="cpu")]
        for i in files.unique().tolist():
            found.append(self.gather(i, distinct[files == i] - self.starts[i]))
        return torch.cat(found)[place]

    def gather(self, i: int, numbers: Tensor) -> Tensor:
        """Rows of a file by their numbers in it, int64 [n], rising, -> [n, *E]. A file of another
        time than in the manifest is read whole once, for its checksum.

        Raises:
            FileError: The file has changed, or cannot be read.
        """
        self._expect_unchanged(i)
        if not self._trusted[i]:
            self._compare(i, self._checksum(i, lambda rows: None))
        return rows.gather(self.arrays[i], numbers)

    def refuse(self, i: int, crc: int) -> NoReturn:
        """Raises FileError for a file that has this checksum, and had another one."""
        expected = self.manifest.shards[i].crc32
        raise FileError(
            f"{self.arrays[i].path}: has changed since {_manifest.NAME} was written: its "
            f"checksum is {crc}, not {expected}"
        )

    def rows_of_all(self, numbers: Tensor) -> Tensor:
        """The same by whichever rank, in float64.

        Raises:
            FileError, RankError: A file has changed, or cannot be read.
        """
        self.ranks.agree("rows", {"numbers": numbers})
        sizes, owner = torch.tensor([self.sizes, self.owner], dtype=torch.int64, device="cpu")
        rank = owner[torch.bucketize(numbers, sizes.cumsum(0), right=True)]
        found = torch.zeros(
            (len(numbers), *self.manifest.event_shape), dtype=torch.float64, device="cpu"
        )

        def own() -> Iterator[tuple[Tensor, ...]]:
            mine = rank == self.ranks.rank
            yield (found.clone().index_put_((mine,), self.rows(numbers[mine]).double()),)

        everyone = range(self.ranks.size)
        for i, (rows_of_one,) in enumerate(
            self.ranks.exchanged(everyone, everyone, own(), (found,))
        ):
            found[rank == i] = rows_of_one[rank == i]
        return found

    def verify(self, report: Callable[[int, int], None]) -> None:
        """Reads this rank's files and compares their checksums with the manifest's. report(rows,
        all rows).

        Raises:
            FileError: A file has changed since the manifest was written.
        """
        done, count = 0, sum(self.sizes[i] for i in self.own)
        for i in self.own:
            before = done
            self._compare(
                i, self._checksum(i, lambda rows, before=before: report(before + rows, count))
            )
            done += self.sizes[i]

    def _checksum(self, i: int, report: Callable[[int], None]) -> int:
        """The CRC-32 of the rows of a file as it is now."""
        crc = 0
        for start, block, crc_so_far in _manifest.blocks(self.arrays[i]):
            crc = crc_so_far
            report(start + len(block))
        return crc

    def _read(self, task: Block, buffer: np.ndarray, sums: dict[int, int]) -> Tensor:
        i, first, last = task
        at = self.arrays[i]
        self._expect_unchanged(i)
        y = rows.read(at, first, last, buffer)
        if not self._trusted[i]:
            size = (last - first) * at.row_bytes
            sums[i] = zlib.crc32(buffer.data[:size], sums.get(i, 0))
            if last == at.shape[0]:
                self._compare(i, sums[i])
        return y

    def _expect_unchanged(self, i: int) -> None:
        path = self.arrays[i].path
        if stamp(path) != self._stamps[i]:
            raise FileError(f"{path}: has changed since the cloud was opened: open it anew")

    def _compare(self, i: int, crc: int) -> None:
        if crc != self.manifest.shards[i].crc32:
            self.refuse(i, crc)
        self._trusted[i] = True


def numbers_of(files: object, count: int) -> list[int]:
    """The numbers of the files that are asked for, of `count`; all of them for None.

    Raises:
        TypeError, ValueError: They are none, or one comes twice.
    """
    if files is None:
        return list(range(count))
    if not isinstance(files, Iterable):
        raise TypeError(f"files: expected numbers of files, got {type(files).__name__}")
    numbers = [check.integer("files", i, 0, count - 1) for i in files]
    if len(set(numbers)) < len(numbers):
        raise check.mismatch("files", "each file once", numbers)
    return numbers
