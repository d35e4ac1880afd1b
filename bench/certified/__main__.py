"""python -m bench.certified: certified sparse evaluation against the dense op and faiss, on a CPU.

log_prob, denoised and tr F of batches of noisy atoms at nine noise levels, by DiffusionFisher with
tolerance=None and tolerance=1e-6, in turn, batch after batch; the k nearest atoms by faiss-cpu (if
installed) on the same batches; sampling trajectories; and what the index costs. A wrong result is
refused. Writes bench/results/certified.csv, docs/images/certified-*.png and the tables of
docs/guide/certified.md; Ctrl-C leaves the rows so far in certified.part.csv.
"""

from __future__ import annotations

import argparse
import csv
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

import dfkernels as df
from dfkernels._torch import native
from dfkernels.methods.denoiser import Denoiser
from dfkernels.methods.grid import time_grid
from dfkernels.methods.samplers import sample
from experiments import extra
from experiments.progress import Progress

from .. import machine, table
from .contenders import CONTENDERS, TOLERANCE, Nearest, Truth, faiss, fisher, values
from .data import Data, available, data_sets

B = 8
ULP = 2.0**-23  # of float32, in which all is computed
IMAGES = table.ROOT / "docs" / "images"
COLUMNS = (
    "kind", "data", "N", "d", "B", "batches", "schedule", "step", "alpha", "sigma", "dense_ms",
    "certified_ms", "ratio", "ratio_of_totals", "atoms_read", "dropped_mass", "log_prob",
    "dense_log_prob_error", "certified_log_prob_error", "log_prob_bound", "dense_mean_error",
    "certified_mean_error", "mean_bound", "samples_apart", "states_apart", "k", "faiss_ms",
    "faiss_search_ms", "faiss_missing_mass", "faiss_log_prob_error", "faiss_mean_error",
    "build_s", "index_share",
)  # fmt: skip
Row = dict[str, object]


def in_turn(
    contenders: dict[str, Callable], batches: list[Tensor], *args
) -> dict[str, list[float]]:
    """Seconds of every contender and batch; the first batch is warm-up."""
    times = {name: [] for name in contenders}
    for x in batches:
        for name, function in contenders.items():
            start = time.perf_counter()
            function(x, *args)
            times[name].append(time.perf_counter() - start)
    return {name: t[1:] for name, t in times.items()}


def compared(times: dict[str, list[float]]) -> Row:
    dense, certified = times["dense"], times["certified"]
    ratios = [a / b for a, b in zip(dense, certified, strict=True)]
    return {
        "dense_ms": statistics.median(dense) * 1e3,
        "certified_ms": statistics.median(certified) * 1e3,
        "ratio": statistics.median(ratios),
        "ratio_of_totals": sum(dense) / sum(certified),
    }


def queries(y: Tensor, sigma: float, batches: int) -> list[Tensor]:
    """Random atoms plus noise, fresh in every batch; one batch more for the warm-up."""
    generator = torch.Generator().manual_seed(round(1e3 * sigma))
    shape = batches + 1, B
    x = y[torch.randint(len(y), shape, generator=generator)]
    return list(x + sigma * torch.randn(*shape, y.shape[1], generator=generator))


def refuse(what: str, excess: Tensor) -> None:
    """Nothing is reported of a result that is further off than its bound and rounding allow."""
    if not bool((excess <= 0).all()):
        sys.exit(f"{what}: {excess.max():.1e} beyond its bound; stopped")


def level(
    cloud: df.PointCloud, data: Data, sigma: float, batches: list[Tensor], truth: Truth, q: slice
) -> Row:
    """A row: times over the batches, errors of the last one, whose truth is known."""
    contenders = {
        name: lambda x, tolerance=tolerance: values(x, cloud, sigma, tolerance)
        for name, tolerance in CONTENDERS.items()
    }
    times = in_turn(contenders, batches)
    all_found = [fisher(x, cloud, sigma, TOLERANCE) for x in batches[1:]]
    found = all_found[-1]
    dense = truth.errors(*values(batches[-1], cloud, sigma, None)[:2], q)
    certified = truth.errors(found.log_prob, found.denoised, q)
    bounds = found.log_prob_error, found.mean_error / truth.mean[q].norm(dim=1)
    dropped = torch.stack([f.dropped_mass for f in all_found])
    size = truth.log_prob[q].abs()
    what = f"{data.name} N={len(cloud)} sigma={sigma}"
    refuse(f"{what}: dropped_mass", dropped - TOLERANCE)
    refuse(f"{what}: log_prob", certified[0] - bounds[0] - 2 * dense[0] - 4 * ULP * size)
    refuse(f"{what}: mean", certified[1] - bounds[1] - 2 * dense[1] - 4 * ULP)
    return {
        "kind": "level",
        "sigma": sigma,
        "alpha": 1.0,
        "batches": len(batches) - 1,
        **compared(times),
        "atoms_read": float(torch.stack([f.atoms_read for f in all_found]).double().mean()),
        "dropped_mass": float(dropped.max()),
        "log_prob": float(size.max()),
        "dense_log_prob_error": float(dense[0].max()),
        "certified_log_prob_error": float(certified[0].max()),
        "log_prob_bound": float(bounds[0].max()),
        "dense_mean_error": float(dense[1].max()),
        "certified_mean_error": float(certified[1].max()),
        "mean_bound": float(bounds[1].max()),
    }


def nearest_level(
    nearest: Nearest, sigma: float, batches: list[Tensor], truth: Truth, q: slice
) -> Row:
    times = in_turn({"all": nearest.values, "search": nearest.search}, batches, sigma)
    log_prob, mean, atoms = nearest.values(batches[-1], sigma)
    errors = truth.errors(log_prob, mean, q)
    return {
        "k": nearest.k,
        "faiss_ms": statistics.median(times["all"]) * 1e3,
        "faiss_search_ms": statistics.median(times["search"]) * 1e3,
        "faiss_missing_mass": float(truth.missing(atoms, q).max()),
        "faiss_log_prob_error": float(errors[0].max()),
        "faiss_mean_error": float(errors[1].max()),
    }


def walk(cloud: df.PointCloud, schedule, t: Tensor, x: Tensor, tolerance: float | None):
    """(seconds of each evaluation, the states at t, the sample): DDIM along t, then x_0 from the
    last state. With EDM that is Euler's method, its step to sigma = 0 included.
    """
    ideal = Denoiser.exact(cloud, schedule, tolerance=tolerance)
    stamps = [time.perf_counter()]
    path = sample(
        ideal, x, t, "ddim", callback=lambda done, total: stamps.append(time.perf_counter())
    )
    found = ideal.denoised(path.x[-1], t[-1])
    stamps.append(time.perf_counter())
    return [b - a for a, b in pairwise(stamps)], path.x, found


def apart(x: Tensor, from_: Tensor) -> float:
    return float((x - from_).norm() / from_.norm())


def trajectory(
    cloud: df.PointCloud, name: str, schedule, t: Tensor, starts: int, step: Callable[[], None]
) -> Iterator[Row]:
    """A row for every step, and one for the whole."""
    generator = torch.Generator().manual_seed(0)
    times = {c: [] for c in CONTENDERS}
    samples_apart, states_apart = [], []
    for start in range(starts + 1):
        x = schedule.sigma(t[0]).float() * torch.randn(B, cloud.d, generator=generator)
        samples, paths = {}, {}
        for contender, tolerance in CONTENDERS.items():
            took, paths[contender], samples[contender] = walk(cloud, schedule, t, x, tolerance)
            if start:  # the first is warm-up
                times[contender].append(took)
        samples_apart.append(apart(samples["certified"], samples["dense"]))
        states_apart += [
            apart(a, b) for a, b in zip(paths["certified"], paths["dense"], strict=True)
        ]
        step()
    here = {"schedule": name, "batches": starts}
    for i, (now, state) in enumerate(zip(t, paths["certified"], strict=True)):
        alpha, sigma = schedule(now)
        found = df.DiffusionFisher(state, cloud, float(alpha), float(sigma), tolerance=TOLERANCE)
        yield {
            **here,
            "kind": "step",
            "step": i + 1,
            "alpha": float(alpha),
            "sigma": float(sigma),
            **compared({c: [took[i] for took in times[c]] for c in CONTENDERS}),
            "atoms_read": float(found.atoms_read.double().mean()),
            "dropped_mass": float(found.dropped_mass.max()),
        }
    totals = compared({c: [sum(took) for took in times[c]] for c in CONTENDERS})
    differences = {"samples_apart": max(samples_apart), "states_apart": max(states_apart)}
    yield {**here, "kind": "trajectory", "step": len(t), **totals, **differences}


def trajectories(cloud: df.PointCloud, data: Data, step: Callable[[], None]) -> Iterator[Row]:
    assert data.steps is not None
    edm, vp = data.steps
    schedule = df.schedule.EDM()
    t = time_grid(schedule, edm - 1, (0.002, 80.0), "edm")
    yield from trajectory(cloud, "EDM", schedule, t, data.batches, step)
    t = torch.linspace(1.0, 1e-3, vp, dtype=torch.float64)
    yield from trajectory(cloud, "VP", df.schedule.VP(), t, data.batches, step)


def measured(data: Data, threads: int, bar: Progress) -> Iterator[Row]:
    """All rows of a data set."""
    bar.step(f"{data.name}: reading", 0)
    y = data.load()
    N, d = y.shape
    name, here = f"{data.name}, N = {N:,}", {"data": data.name, "N": N, "d": d, "B": B}
    cloud = df.PointCloud(y)
    bar.step(f"{name}: index", 0)
    start = time.perf_counter()
    index = cloud.index()
    seconds = time.perf_counter() - start
    yield {**here, "kind": "index", "build_s": seconds, "index_share": index.nbytes / y.nbytes}
    bar.step(f"{name}: float64")
    batches = {sigma: queries(y, sigma, data.batches) for sigma in data.sigma}
    known = torch.cat([xs[-1] for xs in batches.values()])
    truth = Truth(y, known, torch.tensor(data.sigma).repeat_interleave(B))
    nearest = Nearest(y, data.k, threads) if faiss and data.k < N else None
    for i, sigma in enumerate(data.sigma):
        bar.step(f"{name}: sigma")
        q = slice(B * i, B * (i + 1))
        row = level(cloud, data, sigma, batches[sigma], truth, q)
        if nearest:
            row |= nearest_level(nearest, sigma, batches[sigma], truth, q)
        yield {**here, **row}
    del nearest
    if data.steps:
        yield from (
            {**here, **row} for row in trajectories(cloud, data, lambda: bar.step(f"{name}: paths"))
        )


def units(data: Data) -> int:
    return 1 + len(data.sigma) + (2 * (data.batches + 1) if data.steps else 0)


def shown(row: Row) -> str:
    """A row as a line on the terminal; not every step."""
    head = f"{row['data']:8s} N={row['N']:<7,d}"
    if row["kind"] == "index":
        return f"{head} index: {row['build_s']:.1f} s, {row['index_share']:.2f} of the cloud"
    times = f"{row['dense_ms']:9.2f} ms dense {row['certified_ms']:9.2f} certified"
    times += f" {row['ratio']:6.2f} x"
    if row["kind"] == "trajectory":
        return f"{head} {row['schedule']}, {row['step']} steps {times}"
    peer = f"; top-{row['k']} {row['faiss_ms']:.2f} ms" if row.get("k") else ""
    return f"{head} sigma={row['sigma']:<5g} {times} {row['atoms_read']:9.1f} atoms{peer}"


def run(quick: bool, threads: int, csv_path: Path) -> list[dict]:
    """Measures everything. Rows go to a .part.csv as they come, which becomes the CSV at the
    end."""
    if faiss is None:
        print("faiss is not installed (pip install faiss-cpu): no top-k peer", flush=True)
    wanted = data_sets(quick)
    for data in wanted:
        if not available(data):
            print(
                f"{data.needs} is not installed (pip install {data.needs}): no {data.name}",
                flush=True,
            )
    wanted = [data for data in wanted if available(data)]
    about = machine.columns(threads, {}) | {
        "tolerance": TOLERANCE,
        "faiss": faiss.__version__ if faiss else "",
    }
    partial = csv_path.with_suffix(".part.csv")
    total = sum(map(units, wanted))
    with (
        partial.open("w", newline="") as file,
        Progress("bench.certified", total) as bar,
        torch.no_grad(),
    ):
        writer = csv.DictWriter(file, [*COLUMNS, *about])
        writer.writeheader()
        stopped = []
        # Between rows: an exception raised anywhere may end in a callback that swallows it.
        previous = signal.signal(signal.SIGINT, lambda *_: stopped.append(True))
        try:
            for row in (row for data in wanted for row in measured(data, threads, bar)):
                short = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
                writer.writerow(short | about)
                file.flush()
                if row["kind"] != "step":
                    bar.clear()
                    print(shown(row), flush=True)
                if stopped:
                    bar.clear()
                    sys.exit(f"stopped; the rows so far are in {partial}")
        finally:
            signal.signal(signal.SIGINT, previous)
    os.replace(partial, csv_path)
    return table.read_rows(csv_path)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.certified", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, seconds; writes to out/certified"
    )
    parser.add_argument(
        "--out", type=Path, help="a folder for CSV and figures; no document changes"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--draw", action="store_true", help="only figures and tables, from the CSV")
    args = parser.parse_args()
    if not native.available:
        sys.exit(f"the compiled part is not loaded: {native.reason}")
    extra.require()
    from .figure import draw

    out = args.out or (Path("out/certified") if args.quick else None)
    csv_path, images = (out / "certified.csv", out) if out else (table.CERTIFIED, IMAGES)
    csv_path.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    if args.draw and not csv_path.exists():
        sys.exit(f"{csv_path} does not exist: run without --draw")
    rows = table.read_rows(csv_path) if args.draw else run(args.quick, args.threads, csv_path)
    draw(rows, images)
    print(f"{csv_path}, {images / 'certified-*.png'}")
    if out is None:
        table.write_pages()


if __name__ == "__main__":
    main()
