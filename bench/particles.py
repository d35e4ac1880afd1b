"""python -m bench.particles: a step of a particle flow beside the [M, M, d] form that people use;
a minute on two idle cores.

A step is one of DPVI's BLOB with continuous weights: bandwidth by the nearest neighbour, forces,
first variations, positions and weights, on a Gaussian whose score costs nothing beside it. The peer
has the differences of all pairs as a tensor [M, M, d], as the published code has, in the same
dtype, with the weights in the log domain as ours; both results are compared, and where it would not
fit into memory it is left out. Best of several runs, the contenders in turn. Memory is the largest
growth of the process in a step. Writes bench/results/particles-avx512.csv or particles-avx2.csv.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import time
from collections.abc import Callable

import torch
from torch import Tensor

from dfkernels.methods.particles import KL, Flow, Particles

from . import machine, table
from .sinkhorn import seconds_and_memory

TAU, RATE = 0.01, 0.3
CASES = [
    (M, d, dtype)
    for M, d in ((128, 10), (512, 10), (2048, 10), (512, 100))
    for dtype in (torch.float64, torch.float32)
]
MOST = 2e9  # bytes of the peer's differences, of which some copies are alive at once
ROUNDS, SECONDS = 2, 2.0


def log_target(x: Tensor) -> Tensor:
    return -x.square().sum(1) / 2


def pairs_step(x: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor]:
    """The step on a tensor [M, M, d]."""
    difference = x[:, None] - x[None]
    square = difference.square().sum(2)
    off = square + torch.diag(torch.full_like(log_w, math.inf))
    h = off.amin(1).mean()
    kernel = torch.exp(-square / h)
    gradient_of_kernel = -2 * difference * kernel[:, :, None] / h
    w = log_w.exp()
    q = kernel @ w
    force = x + (w[:, None] * gradient_of_kernel).sum(1) / q[:, None]
    force = force + ((w / q)[:, None] * gradient_of_kernel).sum(1)
    value = x.square().sum(1) / 2 + q.log() + kernel @ (w / q)
    return x - TAU * force, (log_w - TAU * RATE * value).log_softmax(0)


def best(call: Callable[[], object]) -> float:
    """Seconds of the fastest of several calls."""
    found, begin = [], time.perf_counter()
    while len(found) < ROUNDS or (time.perf_counter() - begin < SECONDS and len(found) < 1000):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def measure(M: int, d: int, dtype: torch.dtype, threads: int) -> dict:
    """In a process of its own, whose memory nothing has grown yet."""
    torch.set_num_threads(threads)
    x = torch.randn(M, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    p = Particles(x)
    flow = Flow(KL(log_target), TAU, friction=None, weight_rate=RATE)
    ours = lambda: flow.step(p)
    peer = lambda: pairs_step(p.x, p.log_w)
    flow.step(Particles(x[:8]))
    pairs_step(x[:8], p.log_w[:8])
    _, memory = seconds_and_memory(ours)
    case = {"M": M, "d": d, "dtype": str(dtype).removeprefix("torch.")}
    seconds = best(ours)
    row = case | {"seconds": seconds, "megabytes": memory}
    if M * M * d * x.element_size() > MOST:
        return row | {"pairs_seconds": math.nan, "pairs_megabytes": math.nan, "ratio": math.nan}
    _, memory = seconds_and_memory(peer)
    found, (x_wanted, log_w) = ours(), peer()
    tolerance = 1e3 * torch.finfo(dtype).eps
    for one, other in ((found.x, x_wanted), (found.log_w, log_w)):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    of_pairs, seconds = min(best(peer), best(peer)), min(seconds, best(ours))
    row |= {"seconds": seconds, "pairs_seconds": of_pairs, "pairs_megabytes": memory}
    return row | {"ratio": of_pairs / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.particles", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", choices=("v3", "base"), help="hold the run to it")
    args = parser.parse_args()
    isa = machine.hold(args.isa)
    rows, spawn = [], multiprocessing.get_context("spawn")
    for case in CASES:
        with spawn.Pool(1) as pool:
            found = pool.apply(measure, (*case, args.threads))
        row = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in found.items()}
        print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
        rows.append(row | machine.columns(args.threads, {}))
    table.write_rows(machine.results("particles", isa), rows)


if __name__ == "__main__":
    main()
