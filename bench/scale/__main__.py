"""python -m bench.scale: a cost model of a pass over a cloud, predicted against measured.

Measures this machine's constants (memory, multiply-adds, files from the disk and from the page
cache, messages over gloo, and the kernel on small clouds), then passes over clouds in memory, over
files in the page cache and from the disk, and by two ranks, and compares; some minutes on two idle
cores and 6 GiB of disk. `--out-of-core` does the one large measurement instead: 16 GiB of uint8
atoms, read with 2 GiB of memory, beside the rate at which one thread reads the same files from end
to end in the same run.

Writes bench/results/scale-avx512.csv or scale-avx2.csv, of which each of the two replaces only its
own rows, the tables in the documents, and the figure.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import machine, table
from . import constants, figure, model, passes, ranks, shards
from .constants import Constants, Kernel

D = 16_384  # of the latents
COUNTS = (1, 8, 64)  # queries
SHARED_COUNTS = (8, 64, 256)  # of passes that ranks share
MEMORY = 1 << 30  # bytes of atoms that a ShardedCloud may hold
LARGE = 16  # GiB of the large measurement
DTYPES = {1: torch.uint8, 4: torch.float32}


class Sizes(NamedTuple):
    """Numbers of the small clouds, of those in memory and in files; atoms and dimension of the one
    that ranks share; seconds for a time in memory."""

    small: int
    memory: int
    files: int
    shared: tuple[int, int]
    seconds: float


FULL = Sizes(1 << 26, 1 << 28, 1 << 32, (400_000, 784), 2.0)
QUICK = Sizes(1 << 18, 1 << 20, 1 << 22, (2000, 784), 0.0)


class Bench:
    """The measurements, which share the constants.

    Args:
        folder: For files.
        sizes: Of what is measured.
        threads: Of a process that does not share its work.
    """

    def __init__(self, folder: Path, sizes: Sizes, threads: int) -> None:
        self.folder, self.sizes, self.threads = folder, sizes, threads
        self.cores = max(threads, os.cpu_count() or 1)
        self.kernel = Kernel(sizes.small, sizes.seconds)
        self.latents = shards.make(folder / "latents", sizes.files // D, D, 4)
        self.known: Constants = constants.measured(threads, self.latents)

    def cases(self) -> Iterator[dict]:
        """All rows but those of the large measurement."""
        for itemsize, d in ((1, D), (4, 784)):
            y = passes.atoms(self.sizes.memory // d, d, DTYPES[itemsize])
            for B in COUNTS:
                measured = passes.of_memory(y, B, self.sizes.seconds)
                yield self.row("memory", model.Pass(len(y), d, itemsize, B), measured)
            del y
        for store in ("page cache", "disk"):
            for B in COUNTS:
                work = model.Pass(self.sizes.files // D, D, 1, B, files=len(self.latents))
                yield from self.of_files(store, self.folder / "latents", work, rounds=3)
        yield from self.shared()

    def shared(self) -> Iterator[dict]:
        """By one and by two ranks of one thread."""
        folder, (N, d) = self.folder / "images", self.sizes.shared
        files = shards.make(folder, N, d, 4, "float32")
        for B in SHARED_COUNTS:
            for count in (1, 2):
                shards.sequential(files)
                found = ranks.shared(folder, B, count, MEMORY // 2, rounds=3)
                work = model.Pass(N, d, 4, B, ranks=count, files=len(files))
                yield self.row("page cache", work, found.seconds, 1, wire_bytes=found.wire_bytes)

    def out_of_core(self, gib: int) -> Iterator[dict]:
        """The large measurement, of few queries; refused where the bits are not those of the same
        shards in memory, in a cloud of 256 MiB."""
        small = shards.make(self.folder / "small", self.sizes.memory // D, D, 4)
        if not passes.same_bits(small, COUNTS[1]):
            sys.exit("a pass over files leaves other bits than one over the same shards in memory")
        shutil.rmtree(self.folder / "latents")  # of which the constants were measured
        N, folder = (gib << 30) // D, self.folder / "large"
        files = shards.make(folder, N, D, max(2, gib))
        for store in ("disk", "page cache"):
            for B in COUNTS[:2]:
                yield from self.of_files(store, folder, model.Pass(N, D, 1, B, files=len(files)), 2)

    def of_files(
        self, store: str, folder: Path, work: model.Pass, rounds: int
    ) -> Iterator[dict[str, Any]]:
        """A row, or none where the page cache cannot be emptied, or does not hold the files."""
        cold = store == "disk"
        found = passes.from_files(folder, work.B, cold, MEMORY, self.threads, rounds)
        if found.cached > 0.1 if cold else found.cached < 0.9:
            share = f"{100 * found.cached:.0f} %"
            print(f"{store}, B = {work.B}: left out, the page cache holds {share} of the files")
            return
        reading, measured = (statistics.median(t) for t in (found.reading, found.passes))
        more = {"reading_s": reading, "of_rate": reading / measured, "peak_mb": found.peak / 1e6}
        yield self.row(store, work, measured, **more)

    def row(
        self, store: str, work: model.Pass, measured: float, threads: int | None = None, **more
    ) -> dict[str, Any]:
        """What was predicted, beside what was measured."""
        threads, dtype = threads or self.threads, DTYPES[work.itemsize]
        has = self.known.machine(store, self.cores, threads, work.ranks)
        expected = model.predicted(work, has, self.kernel(work.d, dtype, work.B, threads))
        columns = {
            "store": store,
            "N": work.N,
            "d": work.d,
            "dtype": str(dtype).removeprefix("torch."),
            "B": work.B,
            "files": work.files,
            "ranks": work.ranks,
            "threads_a_rank": threads,
            "bytes": work.bytes,
            "flops": work.flops,
            "messages": work.messages,
            "message_bytes": work.message_bytes,
            "wire_bytes": "",
            "floor_s": model.floor(work, has),
            "predicted_s": expected,
            "measured_s": measured,
            "over_predicted": measured / expected,
            "reading_s": "",
            "of_rate": "",
            "peak_mb": "",
            "load": os.getloadavg()[0],
        }
        found = columns | more
        return {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in found.items()}


def show(row: dict) -> None:
    names = ["store", "dtype", "B", "ranks", "floor_s", "predicted_s", "measured_s"]
    names += ["over_predicted", "of_rate", "peak_mb", "load"]
    print("  ".join(f"{name} {row[name]}" for name in names if row[name] != ""), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("--out-of-core", action="store_true", help="the large measurement")
    parser.add_argument("--gib", type=int, default=LARGE, help="its size; else writes nothing")
    parser.add_argument("--folder", type=Path, help="for files, on the disk to be measured")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; writes nothing")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.gib < 1 or args.threads < 1:
        parser.error("--gib and --threads: expected at least 1")
    if args.folder and not args.folder.is_dir():
        parser.error(f"--folder: {args.folder} is no folder")
    if args.out_of_core:
        shards.expect_room(args.folder or Path(tempfile.gettempdir()), args.gib << 30)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended: its files are removed"))
    isa = machine.hold(None)
    torch.set_num_threads(args.threads)
    kind, rows = "out of core" if args.out_of_core else "case", []
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="scale-") as made:
        bench = Bench(Path(made), QUICK if args.quick else FULL, args.threads)
        rates = bench.known._asdict()
        print("  ".join(f"{k} {v:.4g}" for k, v in rates.items()), flush=True)
        about = machine.columns(args.threads, rates)
        for row in bench.out_of_core(args.gib) if args.out_of_core else bench.cases():
            show(row)
            rows.append({"kind": kind} | row | about)
    if args.quick or (args.out_of_core and args.gib != LARGE):
        return
    path = machine.results("scale", isa)
    kept = [r for r in table.read_rows(path) if r["kind"] != kind] if path.exists() else []
    table.write_rows(path, sorted([*kept, *rows], key=lambda r: r["kind"]))
    table.write_pages()
    figure.draw(table.read_rows(path), table.ROOT / "docs" / "images")


if __name__ == "__main__":
    main()
