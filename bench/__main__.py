"""python -m bench: every op and size against its peers and its floor, on the CPU, in about five
minutes.

All contenders of a case run in turn, round after round, in this process; a row reports medians. A
case whose result is wrong is refused. Writes bench/results/cpu-avx512.csv or cpu-avx2.csv, by the
instruction set in use, and the tables of the documents. `--isa v3` holds a CPU that has AVX-512 to
AVX2: our kernels, and the peers with all that they use.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

import dfkernels as df
from dfkernels._torch import native

from . import machine, table
from .cases import CHAINS, NOISE, SIZES, Case, ChainCase, atoms
from .floor import floor, measure
from .peers import contenders, transport_chain_reference


def run(function, inputs) -> float:
    start = time.perf_counter()
    function(**inputs)
    return time.perf_counter() - start


def check(case: Case | ChainCase) -> None:
    """Refuses a wrong result: the last query against float64 by differences; of 64 chains the
    median error (near the borders between the atoms' basins a chain amplifies its rounding)."""
    inputs = case.inputs
    if isinstance(case, ChainCase):
        some: dict[str, Any] = {**inputs, "x": inputs["x"][-64:]}
        exact: dict[str, Any] = {k: v.double() for k, v in some.items()}
        want = transport_chain_reference(**exact)[1]
        error = float((df.ops.transport_chain(**some).A - want).norm(dim=(1, 2)).median())
        refuse(case, error, 1e-3)
        return
    got = getattr(df.ops, case.op)(**inputs)
    x, v = inputs["x"][-1].double(), inputs.get("v", inputs["x"])[-1].double()
    sigma, logits, sums = case.sigma_value, [], []
    for rows in case.y.split(2000):
        logits.append(-((x - rows.double()) / sigma).square().sum(1) / 2)
    weights = torch.softmax(torch.cat(logits), 0)
    blocks = list(zip(weights.split(2000), case.y.split(2000), strict=True))
    mean = torch.stack([w @ rows.double() for w, rows in blocks]).sum(0)
    for w, rows in blocks:
        t = (rows.double() - mean) / sigma
        sums.append((w * t.square().sum(1)).sum() if case.op == "posterior" else (w * (t @ v)) @ t)
    whole = case.d if case.op == "posterior" else v
    want = (whole - torch.stack(sums).sum(0)) / sigma**2
    got = got.fisher_trace[-1] if case.op == "posterior" else got[-1]
    error = float((got.double() - want).norm() / want.norm())
    refuse(case, error, 1e-4)


def refuse(case: Case | ChainCase, error: float, limit: float) -> None:
    if not error < limit:
        sys.exit(
            f"{case.op} B={case.B} N={case.N} d={case.d} {case.noise}: relative error {error:.1e};"
            " nothing is timed"
        )


def measure_case(
    case: Case | ChainCase, functions: dict, rates: dict[str, float], rounds: int
) -> dict:
    check(case)
    ours = getattr(df.ops, case.op)
    times = {name: [] for name in ("dfkernels", *functions)}
    for warm in (True, *[False] * rounds):
        for name in times:
            took = (
                run(ours, case.inputs)
                if name == "dfkernels"
                else run(functions[name], case.peer_inputs)
            )
            if not warm:
                times[name].append(took)
    median = {name: statistics.median(t) for name, t in times.items()}
    best = min((n for n in median if n != "dfkernels"), key=lambda n: median[n])
    least, bound = floor(case, rates)
    return {
        "op": case.op,
        "B": case.B,
        "N": case.N,
        "d": case.d,
        "noise": case.noise,
        "sigma": f"{case.sigma_value:.3g}",
        "ess": f"{case.ess:.0f}",
        **{f"{n}_ms": f"{median[n] * 1e3:.3f}" if n in median else "" for n in table.CONTENDERS},
        "floor_ms": f"{least * 1e3:.3f}",
        "bound": bound,
        "time_over_floor": f"{median['dfkernels'] / least:.3f}",
        "best_peer": best,
        "speedup": f"{median[best] / median['dfkernels']:.3f}",
    }


def cases(indices) -> Iterator[Case | ChainCase]:
    """Every op at the sizes wanted; the chains follow the last size."""
    for index in indices:
        B, N, d = SIZES[index]
        y = atoms(N, d)
        for op, noise in itertools.product(("posterior", "fisher_matvec"), NOISE):
            yield Case(op, B, N, d, noise, y)
        if index == len(SIZES) - 1:
            yield from (ChainCase(*size) for size in CHAINS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=7, help="timed rounds of every case (default 7)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="*",
        default=range(len(SIZES)),
        help=f"which of {SIZES}; writes nothing",
    )
    parser.add_argument("--isa", choices=("base", "v3"), help="hold the CPU to it, peers included")
    args = parser.parse_args()
    if not native.available:
        sys.exit(f"the compiled part is not loaded: {native.reason}")
    isa = machine.hold(args.isa)
    torch.set_num_threads(args.threads)
    torch._dynamo.config.recompile_limit = 4 * len(SIZES)
    rates = measure(args.threads)
    print(", ".join(f"{k} {v:.1f}" for k, v in rates.items()), flush=True)
    rows, about = [], machine.columns(args.threads, rates)
    with torch.no_grad():
        for case in cases(args.sizes):
            rounds = (
                min(args.rounds, 3) if case.op == "transport_chain" else args.rounds
            )  # its peer takes seconds
            row = measure_case(case, contenders(case.op), rates, rounds)
            rows.append({**row, **about})
            print(
                f"{case.op:15s} B={case.B:<5d} N={case.N:<7d} d={case.d:<5d} {case.noise:5s}"
                f" {float(row['dfkernels_ms']):9.2f} ms  {row['time_over_floor']} x floor"
                f" ({row['bound']})  {row['speedup']} x faster than {row['best_peer']}",
                flush=True,
            )
    for line in table.summary(rows):
        print(line)
    if len(args.sizes) == len(SIZES):
        table.write_rows(machine.results("cpu", isa), rows)
        table.write_pages()


if __name__ == "__main__":
    main()
