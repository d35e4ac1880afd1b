"""python -m bench.sinkhorn: entropic transport to a marginal error of 1e-4, beside GeomLoss and
POT; ten minutes on two idle cores. Each row is written as soon as it is there.

n = m = 10,000 points in d = 2 and 64, float32, the blur a twentieth and a half of the spread (the
root mean square distance from the mean). geomloss, POT and pykeops (for GeomLoss's online backend)
are left out where they are not installed; `pip install --no-deps` does, in an environment of their
own over this one.

A peer needs up to thousands of iterations, of seconds each. So what is timed of it is an
iteration, as the difference of two runs or, where nothing is set up, a part of one. How many it
needs is counted by its own rule with our half-steps, up to five times our seconds: a ratio with ">"
in front is of a peer that had not arrived by then, with the error it had.
Memory is the largest growth of the process while a contender runs. Writes
bench/results/sinkhorn-avx512.csv or sinkhorn-avx2.csv, of which `--cases` replaces only its own
rows, and the table in the documents.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import dfkernels as df
from dfkernels.methods.sinkhorn._problem import Problem
from dfkernels.methods.sinkhorn.solve import problem_of

from . import machine, table

TOL, N = 1e-4, 10_000
LIMIT = 5  # times our seconds, after which a peer is not followed any further
CASES = {f"{d}-{part}": (d, part) for d in (2, 64) for part in (0.5, 0.05)}  # of the spread


class Peer(NamedTuple):
    name: str
    needs: str  # the module
    run: Callable[[Tensor, Tensor, float, int], object]  # of so many iterations
    few: int  # iterations of the shorter run; 0: there is none
    more: int
    errors: Callable[[Problem, int], Iterator[tuple[int, float]]]  # after so many


def sets(n: int, d: int) -> tuple[Tensor, Tensor, float]:
    """Two normal laws of other means and variances, and their spread."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    y = torch.randn(n, d, generator=generator) * torch.linspace(0.5, 1.5, d) + 1
    squares = [(p - p.mean(0)).square().sum(1).mean().item() for p in (x, y)]
    return x, y, math.sqrt(sum(squares) / 2)


def run_pot(x: Tensor, y: Tensor, blur: float, iterations: int) -> object:
    import ot

    weights = torch.full((len(x),), 1 / len(x)), torch.full((len(y),), 1 / len(y))
    costs = ot.dist(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = dict(numItermax=iterations, stopThr=0.0)
        return ot.bregman.sinkhorn_log(*weights, costs, 2 * blur**2, **options)


def run_geomloss(backend: str) -> Callable[[Tensor, Tensor, float, int], object]:
    def run(x: Tensor, y: Tensor, blur: float, iterations: int) -> object:
        import geomloss

        # the levels are a first one, one for each halving, and a last one; two updates beside them
        span = blur * 2.0 ** (iterations - 4) * 0.99
        options = dict(p=2, blur=blur, scaling=0.5, diameter=span, debias=False, backend=backend)
        with torch.no_grad():
            return geomloss.SamplesLoss("sinkhorn", **options)(x, y)

    return run


def errors_of_pot(problem: Problem, most: int) -> Iterator[tuple[int, float]]:
    """Alternate half-steps from zero."""
    g = problem.transposed.softmin(zeros(problem)[0])
    for k in range(1, most + 1):
        image = problem.transposed.softmin(problem.softmin(g))
        yield k, float(problem.marginal_error(g, image))
        g = image


def zeros(problem: Problem) -> tuple[Tensor, Tensor]:
    """Potentials that are zero for the points as they were given, not about their means."""
    return -problem.level(), -problem.transposed.level()


def errors_of_geomloss(problem: Problem, most: int) -> Iterator[tuple[int, float]]:
    """The schedule that takes as many iterations, tried from the largest number, and if that will
    do from the smallest on."""
    largest = error_of_geomloss(problem, most)
    if largest > TOL:
        yield most, largest
        return
    for k in range(5, most):
        yield k, error_of_geomloss(problem, k)
    yield most, largest


def error_of_geomloss(problem: Problem, iterations: int) -> float:
    """Means of old and new potentials, one update for each eps from the squared diameter down."""
    both = torch.cat([p.rows[0].double() + p.mean / p.unit for p in (problem.x, problem.y)])
    largest = float((both.amax(0) - both.amin(0)).norm())
    levels = max(1, iterations - 4)
    ratio = max(largest / problem.sigma, 1.01)
    sigmas = [largest, *(largest * ratio ** (-k / levels) for k in range(levels)), problem.sigma]
    f, g = zeros(problem)
    for k, sigma in enumerate([sigmas[0], *sigmas, sigmas[-1]]):
        at = problem._replace(sigma=sigma)
        new = at.softmin(g), at.transposed.softmin(f)
        ends = k in (0, len(sigmas) + 1)
        f, g = new if ends else ((f + new[0]) / 2, (g + new[1]) / 2)
    return float(problem.marginal_error(g, problem.transposed.softmin(problem.softmin(g))))


PEERS = [
    Peer("POT", "ot", run_pot, 2, 5, errors_of_pot),
    Peer("GeomLoss", "geomloss", run_geomloss("tensorized"), 5, 8, errors_of_geomloss),
    Peer("GeomLoss online", "pykeops", run_geomloss("online"), 0, 5, errors_of_geomloss),
]


def seconds_and_memory(call: Callable[[], object]) -> tuple[float, float]:
    """The seconds of a call, and by how many MB the process grew in it."""
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
    most, done = [resident()], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], resident())

    before, watcher = most[0], threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    call()
    took = time.perf_counter() - start
    done.set()
    watcher.join()
    return took, most[0] - before


def measure(d: int, part: float, n: int, rounds: int) -> Iterator[dict]:
    x, y, spread = sets(n, d)
    blur, found = part * spread, []
    problem = problem_of(x, y, blur)
    ours = lambda: found.append(df.methods.sinkhorn.solve(x, y, blur, tol=TOL))
    ours()  # warm
    took, memory = seconds_and_memory(ours)
    case = {"case": f"{d}-{part}", "d": d, "blur_over_spread": part, "n": n}
    error = f"{found[0].marginal_error:.1e}"
    yield case | dict(
        contender="dfkernels", seconds=f"{took:.2f}", iterations=found[0].iterations, error=error,
        ratio="1", megabytes=f"{memory:.0f}",
    )  # fmt: skip
    for peer in PEERS:
        if importlib.util.find_spec(peer.needs) is None:
            print(f"{peer.name}: {peer.needs} is not installed")
            continue
        peer.run(x[:100], y[:100], blur, 5)  # compiles
        each, memory = [], 0.0
        for _ in range(rounds):
            few = 0.0
            if peer.few:
                few, _ = seconds_and_memory(lambda peer=peer: peer.run(x, y, blur, peer.few))
            more, memory = seconds_and_memory(lambda peer=peer: peer.run(x, y, blur, peer.more))
            each.append((more - few) / (peer.more - peer.few))
        yield case | row_of(peer, problem, sorted(each)[len(each) // 2], took, memory)


def row_of(peer: Peer, problem: Problem, each: float, ours: float, memory: float) -> dict:
    """How long the peer takes, at so many seconds an iteration."""
    most = max(5, math.ceil(LIMIT * ours / each))
    k, error = 0, math.inf
    for k, error in peer.errors(problem, most):  # noqa: B007
        if error <= TOL:
            break
    sign = "" if error <= TOL else ">"
    return dict(
        contender=peer.name, seconds=f"{k * each:.2f}", iterations=f"{sign}{k}",
        error=f"{error:.1e}", ratio=f"{sign}{k * each / ours:.1f}", megabytes=f"{memory:.0f}",
    )  # fmt: skip


def replaced(rows: list[dict], row: dict) -> list[dict]:
    """The rows with one of a case and contender in place of what was there, in the order of CASES
    and, within a case, of the runs."""
    key = lambda r: (r["case"], r["contender"])
    kept = [r for r in rows if key(r) != key(row) and r["case"] in CASES]
    return sorted([*kept, row], key=lambda r: list(CASES).index(r["case"]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sinkhorn", description=__doc__)
    parser.add_argument("--n", type=int, default=N, help="points of each set; else writes nothing")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--rounds", type=int, default=1, help="timings of an iteration")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", choices=("v3", "base"), help="hold the run to it")
    args = parser.parse_args()
    isa = machine.hold(args.isa)
    torch.set_num_threads(args.threads)
    path, about = machine.results("sinkhorn", isa), machine.columns(args.threads, {})
    for name in args.cases:
        for row in measure(*CASES[name], args.n, args.rounds):
            print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
            if args.n == N:
                before = table.read_rows(path) if path.exists() else []
                table.write_rows(path, replaced(before, row | about))
    if args.n == N:
        table.write_pages()


if __name__ == "__main__":
    main()
