"""A data set in many files, larger than the memory: read shard by shard, and merged.

A folder of .npy or .safetensors files becomes a cloud by its manifest, a JSON file that says which
files there are, in which order, and what they held when it was written.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._io import rows
from .._io.files import FileError
from .._io.rows import Located
from .._torch import check
from .._torch.errors import Unsupported
from .._torch.types import Level
from ..ops import Posterior
from ..partial import Partial, merge
from . import _manifest
from ._reporting import Callback, reporting
from ._shards import stamp

__all__ = ["ShardedCloud", "write_manifest"]


def write_manifest(
    folder: str | Path,
    *,
    key: str | None = None,
    scale: float = 1.0,
    offset: float = 0.0,
    force: bool = False,
    callback: Callback | None = None,
    progress: bool = False,
) -> Path:
    """Writes `manifest.json` into a folder of shards, which a `ShardedCloud` is opened by. Reads
    every file once.

    Args:
        folder: With .safetensors files, or else with .npy files, in the order of the numbers in
            their names. Each holds rows ``[n, *E]``, all of one shape and dtype: float64/32/16,
            bfloat16 or uint8.
        key: Of the array in each .safetensors file; None where a file holds one array only.
        scale, offset: Atoms are scale * row + offset.
        force: Whether to replace a manifest that is there.
        callback: callback(rows, all rows) after each block that was read.
        progress: Whether to show a bar on stderr.

    Returns:
        The path of the manifest.

    Raises:
        ValueError: A shard is missing in the numbering or truncated, lacks the key, has another
            shape or dtype than the first, holds NaN or inf, or ends in a row of zeros, as one does
            whose writer died; there is a manifest already, or it cannot be written. It is a
            `FileError`, whose message names the file.
        TypeError, ValueError: scale or offset is no finite number.
    """
    folder = Path(folder)
    path = folder / _manifest.NAME
    scale, offset = check.constant("scale", scale), check.constant("offset", offset)
    if path.exists() and not force:
        raise FileError(f"{path}: is there already: force replaces it")
    with reporting("manifest", callback, progress, 0) as report:
        made = _manifest.make(folder, key, scale, offset, report)
    made.located(folder)  # as it will be opened: two names of one file are refused here
    made.write(path)
    return path


class _Block(NamedTuple):
    """Rows of a shard that are read together."""

    shard: int
    first: int
    last: int


class ShardedCloud:
    """A data set in many files: a `PointCloud` for what is too large to be one. Results are exact,
    one pass over all files for each call.

    >>> df.methods.sharded.write_manifest("latents", key="latents", scale=0.18215)  # once
    >>> cloud = df.ShardedCloud("latents")
    >>> cloud.posterior(x, alpha, sigma).mean

    Args:
        folder: With a `manifest.json`, which `write_manifest` or `dfkernels manifest FOLDER` wrote.
        memory: Bytes of atoms that are in memory at once: half of them while they are used, half
            while they are read ahead. The last digits of results depend on it.

    `len(cloud)` is N; `event_shape` and `dtype` are those of a stored row; `files` are the names of
    the shards. Opening looks at the header of each file. A file whose time is another one than in
    the manifest, as after copying, has its checksum computed while it is first read; `verify`
    computes all of them.

    Raises:
        ValueError: A file is missing, truncated, of another size, shape or dtype than the manifest
            says, or listed twice; the manifest is missing or damaged. It is a `FileError`, whose
            message names the file.
        TypeError, ValueError: memory is no whole number, or less than two rows.
    """

    def __init__(self, folder: str | Path, *, memory: int = 1 << 30) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileError(f"{folder}: expected a folder with a {_manifest.NAME}")
        self._manifest = _manifest.load(self.folder / _manifest.NAME)
        self._arrays = self._manifest.located(self.folder)
        self._stamps = [stamp(at.path) for at in self._arrays]
        self._trusted = [
            seen[0] == shard.mtime_ns
            for seen, shard in zip(self._stamps, self._manifest.shards, strict=True)
        ]
        row = self._arrays[0].row_bytes
        self.memory = check.integer("memory", memory)
        if self.memory < 2 * row:
            raise check.mismatch("memory", f"at least two rows, {2 * row} bytes", memory)

    def __len__(self) -> int:
        return sum(shard.rows for shard in self._manifest.shards)

    @property
    def event_shape(self) -> torch.Size:
        """The shape E of one atom."""
        return torch.Size(self._manifest.event_shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the atoms are stored; computation follows the query's."""
        return self._arrays[0].dtype

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the shards, in the order in which they are merged."""
        return tuple(shard.file for shard in self._manifest.shards)

    def __repr__(self) -> str:
        event, count = tuple(self.event_shape), len(self.files)
        return f"ShardedCloud(N={len(self)}, event_shape={event}, {self.dtype}, files={count})"

    def posterior(self, x: Tensor, alpha: Level, sigma: Level) -> Posterior:
        """log_prob, mean, fisher_trace and ess of queries, as `ops.posterior` returns them.

        Raises:
            TypeError, ValueError: See `partial`.
        """
        return self.partial(x, alpha, sigma).posterior()

    def log_prob(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """The log-density log q_t(x), [B], in nats.

        Raises:
            TypeError, ValueError: See `partial`.
        """
        return self.posterior(x, alpha, sigma).log_prob

    def fisher_matvec(self, x: Tensor, v: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """F v for v ``[B, *E]`` or ``[B, K, *E]``, in its shape.

        Raises:
            TypeError, ValueError: See `partial`.
        """
        return self.partial(x, alpha, sigma, v=v).fisher_matvec()

    def partial(
        self,
        x: Tensor,
        alpha: Level,
        sigma: Level,
        *,
        v: Tensor | None = None,
        diagonal: bool = False,
        files: Iterable[int] | None = None,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Partial:
        """All results of queries in one go, or the share of some of the files in them.

        Args:
            x, alpha, sigma, v, diagonal: As `Partial.of` takes them.
            files: Numbers of the files to read, of `cloud.files`; None for all. The Partials of
                disjoint files, merged in the order of the files, are to the bit that of all: so
                ranks and machines share the files out, and a run that may be killed goes file by
                file.
            callback: callback(rows, all rows) after each block.
            progress: Whether to show a bar on stderr.

        Returns:
            A `Partial`, which carries no graph.

        Raises:
            ValueError: A file has changed since the manifest was written or the cloud opened, or
                cannot be read (a `FileError`); or an argument is wrong, or requires a gradient.
            TypeError: An argument has a wrong type or dtype.
        """
        given = [t for t in (x, alpha, sigma, v) if isinstance(t, Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in given):
            raise Unsupported(
                "x, alpha, sigma, v: expected tensors that require no gradient, since atoms that "
                "were read are not kept: detach them; the score and F v are results"
            )
        like = torch.empty((0, *self.event_shape), dtype=self.dtype, device="cpu")
        check.tensor("x", x)
        stored = {"scale": self._manifest.scale, "offset": self._manifest.offset}
        of = lambda y: Partial.of(x, y.to(x.device), alpha, sigma, v=v, diagonal=diagonal, **stored)
        nothing = of(like)
        numbers = self._numbers(files)
        count, done = sum(self._arrays[i].shape[0] for i in numbers), 0
        total = part = nothing
        with torch.no_grad(), reporting("atoms", callback, progress, count) as report:
            for block, y in self._blocks(numbers):
                part = merge([part, of(y)])
                if block.last == self._arrays[block.shard].shape[0]:
                    total, part = merge([total, part]), nothing
                done += len(y)
                report(done, count)
        return total

    def verify(self, *, callback: Callback | None = None, progress: bool = False) -> None:
        """Reads all files and compares their checksums with the manifest's.

        Raises:
            ValueError: A file has changed since the manifest was written (a `FileError`, which
                names it).
        """
        done = 0
        with reporting("verify", callback, progress, len(self)) as report:
            for i, at in enumerate(self._arrays):
                crc = 0
                for start, block, crc_so_far in _manifest.blocks(at):
                    crc = crc_so_far
                    report(done + start + len(block), len(self))
                self._compare(i, crc)
                done += at.shape[0]

    def _numbers(self, files: Iterable[int] | None) -> list[int]:
        if files is None:
            return list(range(len(self.files)))
        if not isinstance(files, Iterable):
            raise TypeError(f"files: expected numbers of files, got {type(files).__name__}")
        numbers = [check.integer("files", i, 0, len(self.files) - 1) for i in files]
        if len(set(numbers)) < len(numbers):
            raise check.mismatch("files", "each file once", numbers)
        return numbers

    def _blocks(self, numbers: list[int]) -> Iterator[tuple[_Block, Tensor]]:
        """The rows of some files in order; the next ones are read meanwhile."""
        row = self._arrays[0].row_bytes
        count = self.memory // 2 // row
        tasks = [
            _Block(i, first, min(first + count, self._arrays[i].shape[0]))
            for i in numbers
            for first in range(0, self._arrays[i].shape[0], count)
        ]
        if not tasks:
            return
        largest = max(task.last - task.first for task in tasks) * row
        buffers = [np.empty(largest, np.uint8) for _ in range(2)]
        sums: dict[int, int] = {}  # running checksums, by file
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self._read, tasks[0], buffers[0], sums)
            for i, task in enumerate(tasks):
                y = ahead.result()
                if i + 1 < len(tasks):
                    ahead = reader.submit(self._read, tasks[i + 1], buffers[(i + 1) % 2], sums)
                yield task, y

    def _read(self, task: _Block, buffer: np.ndarray, sums: dict[int, int]) -> Tensor:
        i, first, last = task
        at: Located = self._arrays[i]
        if stamp(at.path) != self._stamps[i]:
            raise FileError(f"{at.path}: has changed since the cloud was opened: open it anew")
        y = rows.read(at, first, last, buffer)
        if not self._trusted[i]:
            size = (last - first) * at.row_bytes
            sums[i] = zlib.crc32(buffer.data[:size], sums.get(i, 0))
            if last == at.shape[0]:
                self._compare(i, sums[i])
        return y

    def _compare(self, i: int, crc: int) -> None:
        expected = self._manifest.shards[i].crc32
        if crc != expected:
            raise FileError(
                f"{self._arrays[i].path}: has changed since {_manifest.NAME} was written: its "
                f"checksum is {crc}, not {expected}"
            )
        self._trusted[i] = True
