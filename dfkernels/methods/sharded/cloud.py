"""The cloud whose atoms are in files."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, distributed

from ..._torch import check, diagnosis
from ..._torch.objects import plain
from ..._torch.types import Level
from ...fisher import DiffusionFisher
from ...law import Drawn, checked_rows, checked_tolerance, different_points, per_channel
from ...ops import Posterior
from ...partial import Partial
from .._ranks import Ranks
from .._reporting import Callback, reporting
from ._certified import partial_within
from ._draw import draw
from ._files import Files, numbers_of
from ._index import write_indexes
from ._manifest import Numbers
from ._moments import partial_of
from ._pass import Pass, stacked
from ._searched import Searched

__all__ = ["ShardedCloud"]


class ShardedCloud(Searched):
    """A data set in many files: a `PointCloud` for what is too large to be one. Results are exact,
    one pass over all files for each call, and one more for a derivative.

    >>> df.methods.sharded.write_manifest("latents", key="latents", scale=0.18215)  # once
    >>> cloud = df.ShardedCloud("latents")
    >>> cloud.posterior(x, alpha, sigma).mean
    >>> df.sample(df.Denoiser.exact(cloud, schedule), x, t)

    It is a law of data as a PointCloud is, immutable, for whatever takes a `cloud`. All atoms weigh
    the same.

    Args:
        folder: With a `manifest.json`, which `write_manifest` or `dfkernels manifest FOLDER` wrote.
        memory: Bytes of atoms that are in memory at once: half of them while they are used, half
            while they are read ahead. The last digits of results depend on it.
        group: A process group of torch.distributed whose ranks share the files out; each has the
            cloud opened with it, calls the same methods with the same queries in the same order,
            and gets the whole results. None, as `torch.distributed.group.WORLD` is before
            `init_process_group`, for this process alone.

    `len(cloud)` is N; `event_shape` and `dtype` are those of a stored row; `files` are the names of
    the shards. Opening looks at the header of each file that this rank reads. A file whose time is
    another one than in the manifest, as after copying, has its checksum computed while it is first
    read; `verify` computes all of them. `scale` and `offset` are numbers, or one for each channel
    in a tuple.

    Raises:
        ValueError: A file is missing, truncated, of another size, shape or dtype than the manifest
            says, or listed twice; the manifest is missing or damaged. It is a `FileError`, whose
            message names the file.
        TypeError, ValueError: memory is no whole number, or less than two rows; or group is not
            initialised, or this process not in it.
        RuntimeError: With a group, here and in all methods: ranks have been given different things,
            or one of them has raised an error, has died, or gives no answer within the group's
            timeout. Every rank raises; it is a `RankError`.
    """

    folder: Path
    memory: int
    scale: Numbers  # pyrefly: ignore[bad-override]  # of channels too
    offset: Numbers  # pyrefly: ignore[bad-override]
    _files: Files
    _device: torch.device

    def __init__(
        self,
        folder: str | Path,
        *,
        memory: int = 1 << 30,
        group: distributed.ProcessGroup | None = None,
    ) -> None:
        ranks = Ranks(group)
        with ranks.telling():
            held = Files(Path(folder), ranks)
            self.__setstate__(
                {
                    "folder": Path(folder),
                    "memory": check.integer("memory", memory),
                    "scale": held.manifest.scale,
                    "offset": held.manifest.offset,
                    "log_prior": None,
                    "_files": held,
                    "_device": torch.device("cpu"),
                }
            )
            if self.memory < self._row_cost:
                raise check.mismatch("memory", f"at least two rows, {self._row_cost} bytes", memory)
        ranks.agree("opening a cloud", {"manifest": held.manifest, "memory": memory})

    @property
    def _y(self) -> Tensor:
        shape = (sum(self._files.sizes), *self._files.manifest.event_shape)
        return torch.empty((), dtype=self._files.dtype, device=self._device).expand(shape)

    @property
    def y(self) -> NoReturn:
        """Not there, as the atoms are in files: `rows` reads some of them.

        Raises:
            AttributeError: Always.
        """
        raise AttributeError(
            "a ShardedCloud has no y, as its atoms are in files: cloud.rows(numbers) reads some"
        )

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the shards, in the order in which they are merged."""
        return tuple(shard.file for shard in self._files.manifest.shards)

    @property
    def own_files(self) -> tuple[str, ...]:
        """The names of those that this rank reads. The largest file goes first, each to the rank
        that has the fewest rows by then, and of several to the first; of files of the same size the
        first goes first.
        """
        return tuple(self.files[i] for i in self._files.own)

    def __repr__(self) -> str:
        parts = [f"N={len(self)}", f"event_shape={tuple(self.event_shape)}", str(self.dtype)]
        parts.append(f"files={len(self.files)}")
        if (self.scale, self.offset) != (1.0, 0.0):
            named = (("scale", self.scale), ("offset", self.offset))
            parts += [f"{n}={a:g}" if isinstance(a, float) else f"{n}=[{len(a)}]" for n, a in named]
        if self._files.ranks.group is not None:
            parts.append(f"ranks={self._files.ranks.size}")
        return f"ShardedCloud({', '.join(parts)})"

    def to(self, *args: Any, **kwargs: Any) -> ShardedCloud:
        """A cloud whose draws are on another device; atoms are read to the queries' device anyway.

        Args:
            args, kwargs: As `Tensor.to` takes them.

        Raises:
            TypeError: A cast: computation follows the queries' dtype, and files stay as they are.
        """
        like = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        if like.dtype != self.dtype:
            raise TypeError(
                f"dtype: expected none, or {self.dtype} as in the files, got {like.dtype}: "
                "computation follows the queries' dtype"
            )
        return self if like.device == self.device else self._replaced(_device=like.device)

    def posterior(
        self, x: Tensor, alpha: Level, sigma: Level, *, tolerance: float | None = None
    ) -> Posterior:
        """log_prob, mean, fisher_trace and ess of queries, as `ops.posterior` returns them.

        Raises:
            TypeError, ValueError: See `partial`.
        """
        return self.partial(x, alpha, sigma, tolerance=tolerance).posterior()

    def log_prob(
        self, x: Tensor, alpha: Level, sigma: Level, *, tolerance: float | None = None
    ) -> Tensor:
        """The log-density log q_t(x), [B], in nats.

        Raises:
            TypeError, ValueError: See `partial`.
        """
        return self.posterior(x, alpha, sigma, tolerance=tolerance).log_prob

    def fisher_matvec(
        self,
        x: Tensor,
        v: Tensor,
        alpha: Level,
        sigma: Level,
        *,
        tolerance: float | None = None,
    ) -> Tensor:
        """F v for v ``[B, *E]`` or ``[B, K, *E]``, in its shape.

        Raises:
            TypeError, ValueError: See `partial`.
        """
        return self.partial(x, alpha, sigma, v=v, tolerance=tolerance).fisher_matvec()

    def fisher_diagonal(
        self, x: Tensor, alpha: Level, sigma: Level, *, tolerance: float | None = None
    ) -> Tensor:
        """diag F, ``[B, *E]``.

        Raises:
            TypeError, ValueError: See `partial`.
        """
        found = self.partial(x, alpha, sigma, diagonal=True, tolerance=tolerance)
        return found.fisher_diagonal()

    def partial(
        self,
        x: Tensor,
        alpha: Level,
        sigma: Level,
        *,
        v: Tensor | None = None,
        diagonal: bool = False,
        files: Iterable[int] | None = None,
        tolerance: float | None = None,
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
            tolerance: None for all atoms; eps in (0, 1) leaves out atoms that together carry less
                than eps of the posterior weight, certainly, and are not read. They are found
                through the indexes of the files, see `index`; `dropped_mass`, `log_prob_error`,
                `mean_error` and `fisher_error` of the result bound what was left out. There are no
                derivatives then, and the last digits depend on which files are looked at together.
            callback: callback(rows, all rows) after each block.
            progress: Whether to show a bar on stderr.

        Returns:
            A `Partial`, differentiable in x, alpha, sigma and v, in reverse and in forward mode.
            Its graph holds no atoms: a derivative reads the files again, except that of log_prob,
            which is made of results. First derivatives only, but for log_prob in x, alpha and sigma
            and the mean in x, whose derivatives can be differentiated once more.

        Raises:
            ValueError: A file has changed since the manifest was written or the cloud opened, or
                cannot be read (a `FileError`); or an argument is wrong.
            TypeError: An argument has a wrong type or dtype.
            NotImplementedError: In a backward pass, for a derivative that there is not.
        """
        with self._files.ranks.telling():
            d = check.query("x", x).shape[1]
            if v is not None:
                check.vectors("v", v, "x", x, d)
            check.choice("diagonal", diagonal, (False, True))
            tolerance = checked_tolerance(tolerance, self)
            over = self._over(x, files)
            over = replace(over, diagonal=diagonal, callback=callback, progress=progress)
            levels = check.alpha(alpha, x), check.sigma(sigma, x)
        with plain(x.device):
            # copies: a query that is changed in place afterwards is another one
            a, s = (t.clone() for t in levels)
            queries = x.clone(), a, s, None if v is None else v.clone()
            if tolerance is None:
                return partial_of(over, *queries)
            return partial_within(over, self._searches, *queries, tolerance)

    def rows(self, numbers: Tensor) -> Tensor:
        """Some atoms, read from their files: values, scale and offset applied.

        Args:
            numbers: Of the atoms in all files together, int64 [n], from 0 to N - 1.

        Returns:
            ``[n, *E]`` in float64 on the cloud's device.

        Raises:
            TypeError: They are no int64 tensor [n].
            ValueError: There is no such atom; or a file has changed, or cannot be read (a
                `FileError`).
        """
        with self._files.ranks.telling():
            checked_rows(numbers, len(self))
        y = self._files.rows_of_all(numbers.cpu())
        y = y * per_channel(stacked(self.scale), y) + per_channel(stacked(self.offset), y)
        return y.to(self.device)

    def verify(self, *, callback: Callback | None = None, progress: bool = False) -> None:
        """Reads all files, with a group each rank its own, and compares their checksums with the
        manifest's.

        Raises:
            ValueError: A file has changed since the manifest was written (a `FileError`, which
                names it).
        """
        ranks = self._files.ranks
        with (
            ranks.telling(),
            reporting("verify", callback, progress and ranks.rank == 0, len(self)) as report,
        ):
            self._files.verify(report)
        ranks.agree("verify", {})

    def index(
        self, *, seed: int = 0, callback: Callback | None = None, progress: bool = False
    ) -> None:
        """Builds an index of each file, beside it: what `tolerance=` works with. `dfkernels index
        FOLDER` does the same. An index that is there is checked and kept, so that a run which was
        killed goes on.

        Args:
            seed: Of the sample and the random projection that find the principal axes. It changes
                how fast the results come, never the results by more than the tolerance.
            callback: callback(rows, all rows) after each file.
            progress: Whether to show a bar on stderr.

        FILE.index is about a quarter of the size of float32 rows, at most 1.3 times the size of
        uint8 ones. Building reads a file some five times, and holds its index in memory.

        Raises:
            ValueError: An index is damaged or of other rows; a file has changed since the manifest
                was written; an index cannot be written (a `FileError`); or rows have less than 32
                bytes, and are read as fast as any index.
            TypeError: seed is no integer.
        """
        self._expect_one_rank("index")
        seed = check.integer("seed", seed)
        with plain(self.device), reporting("index", callback, progress, len(self)) as report:
            write_indexes(self._files, self.scale, self.offset, seed, report)

    def draw(self, x: Tensor, alpha: Level, sigma: Level, *, seed: int) -> Drawn:
        """As `Law.draw`, in one pass over the files: the same draws as from a `PointCloud` of all
        atoms, but for those where two candidates are within rounding of each other.

        Raises:
            TypeError, ValueError: An argument is wrong; the message names it.
        """
        self._expect_one_rank("draw")
        fisher = DiffusionFisher(x, self, alpha, sigma)  # checks the arguments
        seed = check.integer("seed", seed, 0, 2**63 - 1)
        with torch.no_grad(), plain(x.device):
            levels = fisher.alpha, fisher.sigma
            diagnosis.diagnose({"x": x, "alpha": levels[0], "sigma": levels[1]}, None)
            rows = draw(self._over(x), x, *levels, seed)
            return Drawn(rows, self.rows(rows).to(x))

    @property
    def _row_cost(self) -> int:
        """Bytes for a row that is used while another one is read; with numbers for each channel it
        is used in a copy, in the queries' dtype.
        """
        copied = not (isinstance(self.scale, float) and isinstance(self.offset, float))
        return 2 * self._files.row_bytes + 8 * self.d * copied

    def _eps(self, p: Any, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return p.eps(x, alpha, sigma)

    def _score(self, p: Any, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return p.score(x, alpha, sigma)

    def _sampled(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        return self.rows(rows)

    def _without_repeats(self, count: int, generator: torch.Generator) -> Tensor:
        return different_points(self, count, generator)

    def _over(self, x: Tensor, files: Iterable[int] | None = None) -> Pass:
        """A pass over some files, or all of them."""
        numbers, count = numbers_of(files, len(self.files)), max(1, self.memory // self._row_cost)
        return Pass(self._files, numbers, count, self.scale, self.offset, pinned=x.is_cuda)

    def _mapped(self, a: Tensor, b: Tensor, most: int) -> ShardedCloud:
        scale = a.cpu() * stacked(self.scale)
        offset = a.cpu() * stacked(self.offset) + b.cpu()
        number = lambda t: t.item() if len(t) == 1 else tuple(t.tolist())
        return self._replaced(scale=number(scale), offset=number(offset))

    def _replaced(self, **state: object) -> ShardedCloud:
        """A copy with other values of some attributes."""
        other = copy.copy(self)
        other.__setstate__(state)
        return other

    def _fingerprint(self) -> str:
        rows = zlib.crc32(str([(s.rows, s.crc32) for s in self._files.manifest.shards]).encode())
        event, mapped = list(self.event_shape), f"scale={self.scale!r} offset={self.offset!r}"
        return f"shards N={len(self)} {event} {self.dtype} {mapped} crc32={rows}"
