"""The cloud whose atoms are in files."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ..._torch import check
from ..._torch.errors import Unsupported
from ..._torch.types import Level
from ...ops import Posterior
from ...partial import Partial, merge
from .._reporting import Callback, reporting
from ._files import Files, numbers_of

__all__ = ["ShardedCloud"]

T = TypeVar("T")


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
        self._files = Files(self.folder)
        row = self._files.row_bytes
        self.memory = check.integer("memory", memory)
        if self.memory < 2 * row:
            raise check.mismatch("memory", f"at least two rows, {2 * row} bytes", memory)

    def __len__(self) -> int:
        return sum(self._files.sizes)

    @property
    def event_shape(self) -> torch.Size:
        """The shape E of one atom."""
        return torch.Size(self._files.manifest.event_shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the atoms are stored; computation follows the query's."""
        return self._files.arrays[0].dtype

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the shards, in the order in which they are merged."""
        return tuple(shard.file for shard in self._files.manifest.shards)

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
        held = self._files.manifest
        stored = {"scale": held.scale, "offset": held.offset}
        of = lambda y: Partial.of(x, y.to(x.device), alpha, sigma, v=v, diagonal=diagonal, **stored)
        nothing = of(like)
        numbers = numbers_of(files, len(self.files))
        count = sum(self._files.sizes[i] for i in numbers)
        with torch.no_grad(), reporting("atoms", callback, progress, count) as report:
            add = lambda part, y: merge([part, of(y)])
            parts = self._by_file(numbers, nothing, add, lambda done: report(done, count))
            return merge(itertools.chain([nothing], parts))

    def verify(self, *, callback: Callback | None = None, progress: bool = False) -> None:
        """Reads all files and compares their checksums with the manifest's.

        Raises:
            ValueError: A file has changed since the manifest was written (a `FileError`, which
                names it).
        """
        with reporting("verify", callback, progress, len(self)) as report:
            self._files.verify(report)

    def _by_file(
        self,
        numbers: list[int],
        nothing: T,
        add: Callable[[T, Tensor], T],
        report: Callable[[int], None],
    ) -> Iterator[T]:
        """What the rows of each of some files make together: add(add(nothing, block), block) and so
        on. report(rows) after each block.
        """
        done, made = 0, nothing
        count = self.memory // 2 // self._files.row_bytes
        for block, y in self._files.blocks(numbers, count):
            made = add(made, y)
            done += len(y)
            report(done)
            if block.last == self._files.sizes[block.file]:
                yield made
                made = nothing
