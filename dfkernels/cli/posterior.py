"""`dfkernels posterior`: the posterior sums of a user's own atoms at a file of queries."""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from .. import __version__
from .._io import arrays, files, unfinished
from .._io.elsewhere import Elsewhere
from .._io.files import FileError
from .._io.unfinished import Unfinished
from ..cloud import PointCloud
from ..methods._posterior_sums import FIELDS, VECTORS, posterior_sums, step_bytes
from ..methods._ranks import RankError, Ranks
from ..methods._shards import stamp
from ..methods.sharded import ShardedCloud
from . import arguments, inputs
from .progress import progress
from .ranks import torchrun_group


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "posterior",
        help="log q, posterior mean, score, Fisher trace and ESS for your own files",
        description=(
            "Sums over the atoms of DATA [N, ...] at QUERIES [B, ...]: .npy, .npz, .safetensors,"
            " .pt or .pth; FILE:KEY picks one array of several, a.b being entry b of dict a. DATA"
            " may be a folder of shards with a manifest, too. Writes log_prob, mean, score,"
            " fisher_trace and ess, chunk by chunk, beside the result: a run that was killed goes"
            " on when the same command is given again."
        ),
    )
    arguments.add_data(parser)
    parser.set_defaults(scale=None, offset=None)  # a manifest has its own
    parser.add_argument(
        "--memory",
        type=arguments.size,
        metavar="BYTES",
        help="atoms of a folder of shards in memory at once, such as 512M (default: 1G)",
    )
    parser.add_argument(
        "queries", metavar="QUERIES", help="noisy queries, [B, *E], of any real dtype"
    )
    parser.add_argument("--sigma", type=arguments.positive, required=True, help="noise level, > 0")
    parser.add_argument(
        "--alpha", type=arguments.number, default=1.0, help="signal level (default: 1)"
    )
    parser.add_argument(
        "-o",
        "--out",
        default="out.npz",
        metavar="FILE|FOLDER/",
        help=(
            "result: an .npz file, or with a slash at its end a folder of .npy files, which can be"
            " memory-mapped (default: out.npz)"
        ),
    )
    parser.add_argument(
        "--force", action="store_true", help="let the result replace one of the inputs"
    )
    parser.add_argument(
        "--chunk",
        type=arguments.count,
        default=1024,
        help="queries per pass over the atoms (default: 1024)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float64"),
        default="float32",
        help="computation (default: float32)",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    out = Path(args.out)
    try:
        with contextlib.ExitStack() as stack:
            ranks = Ranks(stack.enter_context(torchrun_group()))
            given, work = _begun(args, ranks, stack)
            there = work.folder == out
            results = _finished(given, work, ranks)
    except (RankError, ValueError) as error:  # names the rank, the file or the argument at fault
        raise FileError(str(error)) from None
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        raise FileError("not enough memory: a smaller --chunk needs less") from None
    if ranks.rank:
        return 0
    # With the result on standard output, what is said about it goes where the progress bar is.
    notes = sys.stderr if files.is_standard_output(out) else sys.stdout
    for name, value in results.items():
        print(f"{name:<13}{list(value.shape)!s:<18}mean {value.mean():.6g}", file=notes)
    print(f"{'is the result of this command' if there else 'written'}: {out}", file=notes)
    return 0


def _begun(
    args: argparse.Namespace, ranks: Ranks, stack: contextlib.ExitStack
) -> tuple[_Given, Unfinished | Elsewhere]:
    """The inputs, and the results as far as they are there, until `stack` is closed. The first rank
    has them.
    """
    out, archive, rows = Path(args.out), not args.out.endswith("/"), 0
    work = None
    with ranks.telling():
        if ranks.rank == 0:
            if not args.force:
                _refuse_inputs(args, out)
            if archive and files.is_replaced(out) and out.suffix.lower() != ".npz":
                raise FileError(
                    f"{out}: expected a name that ends in .npz, or with a slash for a folder of"
                    f" .npy files: {out}.npz, or {out}/"
                )
            unfinished.prepare(out, archive)
        given = _Given(args, ranks.group)
        if ranks.rank == 0:
            work = stack.enter_context(given.work(out, archive))
            rows = work.rows
    ranks.agree("dfkernels posterior", given.configuration)
    rows = ranks.first(rows)
    return given, Elsewhere(rows, len(given.queries)) if work is None else work


def _finished(given: _Given, work: Unfinished | Elsewhere, ranks: Ranks) -> dict[str, np.ndarray]:
    """Evaluates the queries that are not done yet, and puts the results into their place."""
    if work.kept and work.rows < work.count:
        print(f"goes on: {work.rows} of {work.count} queries are in {work.folder}", file=sys.stderr)
    try:
        with ranks.telling():
            with progress("posterior", "queries", ranks.rank == 0) as step:
                while work.rows < work.count:
                    work.add(given.evaluated(work, step))
            results = work.finish()
        ranks.agree("the end", {})
        return results
    except KeyboardInterrupt:
        if not work.kept:
            raise
        raise KeyboardInterrupt(
            f"{work.rows} of {work.count} queries are done and kept in {work.folder}; the same"
            " command goes on from there"
        ) from None


def _refuse_inputs(args: argparse.Namespace, out: Path) -> None:
    """Raises FileError if the result would replace one of the inputs, under whatever name."""
    for name in (args.data, args.queries, args.log_prior):
        path = None if name is None else arrays.split(name)[0]
        if path is not None and files.is_same(path, out):
            raise FileError(
                f"{out}: is the input {path}: name another result, or --force to replace it"
            )


def _cloud(
    args: argparse.Namespace, dtype: torch.dtype, group: distributed.ProcessGroup | None
) -> PointCloud | ShardedCloud:
    """The atoms of DATA. Raises FileError."""
    folder = inputs.manifest_folder(args.data)
    if folder is None:
        if group is not None:
            raise FileError(
                f"{args.data}: expected a folder of shards, whose files several processes can share"
                " out, got a file: run it without torchrun"
            )
        if args.memory is not None:
            raise FileError(
                "--memory: expected it with a folder of shards only, and DATA is a file"
            )
        scale = 1.0 if args.scale is None else args.scale
        offset = 0.0 if args.offset is None else args.offset
        return inputs.cloud(args.data, args.log_prior, scale, offset, dtype)
    for option in ("log_prior", "scale", "offset"):
        if getattr(args, option) is not None:
            what = "has no log_prior" if option == "log_prior" else f"has its own {option}"
            raise FileError(f"--{option.replace('_', '-')}: expected none, since {folder} {what}")
    return inputs.sharded(folder, args.memory, dtype, group)


class _Given:
    """The inputs of a run, all of them looked at.

    Raises:
        FileError: Anything wrong with a file or its contents; it names the file, and the rows.
        ValueError: An argument is wrong.
    """

    def __init__(self, args: argparse.Namespace, group: distributed.ProcessGroup | None) -> None:
        self.args, self.dtype = args, getattr(torch, args.dtype)
        if torch.tensor(args.sigma, dtype=self.dtype, device="cpu") <= 0:
            raise FileError(
                f"sigma: expected a number that is > 0 in {args.dtype} too, got {args.sigma}"
            )
        names = (args.data, args.queries, args.log_prior)
        paths = [arrays.split(name)[0] for name in names if name is not None]
        self._stamps = {path: stamp(path) for path in paths if path.is_file()}
        self.cloud = _cloud(args, self.dtype, group)
        event = self.cloud.event_shape
        self.queries = inputs.queries(args.queries, args.data, event, self.dtype)
        self.chunk = min(args.chunk, len(self.queries))

    def work(self, out: Path, archive: bool) -> Unfinished:
        """The results of all queries, as far as they are there."""
        asked, like = tuple(self.queries.shape), np.dtype(self.args.dtype)
        kinds = {name: (asked if name in VECTORS else asked[:1], like) for name in FIELDS}
        many = isinstance(self.cloud, ShardedCloud)
        step = step_bytes(self.chunk, math.prod(asked[1:])) if many else 0
        return Unfinished(out, archive, kinds, self.configuration, step)

    @functools.cached_property
    def configuration(self) -> dict[str, object]:
        """What decides the results. To make it reads all inputs but shards."""
        named = ("sigma", "alpha", "dtype")
        memory = self.cloud.memory if isinstance(self.cloud, ShardedCloud) else None
        return {
            "dfkernels": __version__,
            "torch": torch.__version__,
            "data": self.cloud._fingerprint(),
            "memory": memory,
            "queries": inputs.described(self.queries),
            **{name: getattr(self.args, name) for name in named},
            "chunk": self.chunk,
        }

    def evaluated(
        self, work: Unfinished | Elsewhere, step: Callable[[float, float], None]
    ) -> dict[str, np.ndarray]:
        """The results of the next chunk of queries. step(queries done, all queries)."""
        first, name = work.rows, self.args.queries
        rows = self.queries[first : first + self.chunk]
        x = inputs.converted(name, rows, self.dtype, first)
        place = f"{name}, rows {first} to {first + len(rows) - 1}"
        names = {"x": place, "result": place, "y": self.args.data, "log_prior": self.args.log_prior}
        report = lambda atoms, n: step(first + len(rows) * atoms / n, work.count)
        with inputs.blaming(names, place):
            found = posterior_sums(x, self.cloud, self.args.alpha, self.args.sigma, work, report)
        for path, seen in self._stamps.items():
            if stamp(path) != seen:
                raise FileError(f"{path}: has changed since it was opened: begin anew")
        return found
