"""python -m bench: every op and size against its peers and its floor, on the CPU. With `--rounds 3`
it takes more than ten minutes on two cores; the results are written at the end.

All contenders of a case run in turn, round after round, in this process; a row reports medians. A
case whose result is wrong is refused. Writes bench/results/cpu-avx512.csv or cpu-avx2.csv, by the
instruction set in use, and the tables of the documents. `--isa v3` holds a CPU that has AVX-512 to
AVX2: our kernels, and the peers with all that they use.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

import dfkernels as df
from dfkernels._torch import native

from . import machine, table
from .cases import AVERAGED, CHAINS, NOISE, OPS, OTHER, SIZES, Case, ChainCase, atoms
from .floor import floor, measure
from .peers import contenders, transport_chain_reference

RESULT = {"posterior": "fisher_trace", "average": "average"}  # what `check` looks at


def run(function, inputs) -> float:
    start = time.perf_counter()
    function(**inputs)
    return time.perf_counter() - start


def check(case: Case | ChainCase) -> None:
    """Refuses a wrong result: the last query against float64 by differences, of a draw whether its
    atom has any weight; of 64 chains the median error (near the borders between the atoms' basins a
    chain amplifies its rounding)."""
    inputs = case.inputs
    if isinstance(case, ChainCase):
        some: dict[str, Any] = {**inputs, "x": inputs["x"][-64:]}
        exact: dict[str, Any] = {k: v.double() for k, v in some.items()}
        want = transport_chain_reference(**exact)[1]
        error = float((df.ops.transport_chain(**some).A - want).norm(dim=(1, 2)).median())
        refuse(case, error, 1e-3)
        return
    got = getattr(df.ops, case.op)(**inputs)
    if case.op in RESULT:
        got = getattr(got, RESULT[case.op])
    got = got[-1]
    log_weights, log_prob = exact_weights(case)
    if case.op == "draw":  # an atom that has no weight to speak of
        refuse(case, float(log_weights.max() - log_weights[got]), 40.0)
        return
    if case.op == "log_prob":
        want = log_prob
    elif case.op == "average":
        want = log_weights.exp() @ case.own["values"].double()
    else:
        want = exact_fisher(case, log_weights.exp())
    error = float((got.double() - want).norm() / want.norm())
    refuse(case, error, 1e-4)


def exact_weights(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the last query, by differences: (logs of the weights, log_prob)."""
    x, sigma = case.points["x"][-1].double(), case.sigma_value
    logits = torch.cat(
        [-((x - y.double()) / sigma).square().sum(1) / 2 for y in case.y.split(2000)]
    )
    log_prob = logits.logsumexp(0) - math.log(case.N)
    return logits.log_softmax(0), log_prob - case.d / 2 * math.log(2 * math.pi * sigma**2)


def exact_fisher(case: Case, weights: torch.Tensor) -> torch.Tensor:
    """tr F of the last query or, for fisher_matvec, F v."""
    blocks = list(zip(weights.split(2000), case.y.split(2000), strict=True))
    mean = torch.stack([w @ rows.double() for w, rows in blocks]).sum(0)
    sigma, trace, sums = case.sigma_value, case.op == "posterior", []
    whole = torch.tensor(float(case.d)) if trace else case.own["v"][-1].double()
    for w, rows in blocks:
        t = (rows.double() - mean) / sigma
        sums.append((w * t.square().sum(1)).sum() if trace else (w * (t @ whole)) @ t)
    return (whole - torch.stack(sums).sum(0)) / sigma**2


def refuse(case: Case | ChainCase, error: float, limit: float) -> None:
    if not error < limit:
        sys.exit(
            f"{case.op} B={case.B} N={case.N} d={case.d} {case.noise}: error {error:.1e};"
            " nothing is timed"
        )


def measure_case(
    case: Case | ChainCase, functions: dict, rates: dict[str, float], rounds: int
) -> dict:
    check(case)
    calls = {"dfkernels": (getattr(df.ops, case.op), case.inputs)}
    calls |= {name: (function, case.peer_inputs) for name, function in functions.items()}
    other = OTHER.get(case.op)
    if isinstance(case, Case) and other:
        calls[other] = getattr(df.ops, other), case.points
    times = {name: [] for name in calls}
    for warm in (True, *[False] * rounds):
        for name, call in calls.items():
            took = run(*call)
            if not warm:
                times[name].append(took)
    median = {name: statistics.median(t) for name, t in times.items()}
    best = min(functions, key=lambda name: median[name])
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
        "other": other or "",
        "time_over_other": f"{median['dfkernels'] / median[other]:.3f}" if other else "",
    }


def cases(indices) -> Iterator[Case | ChainCase]:
    """Every op at the sizes wanted; the chains follow the last size."""
    for index in indices:
        B, N, d = SIZES[index]
        y = atoms(N, d)
        for op, noise in itertools.product(OPS, NOISE):
            if op != "average" or B * N * d <= AVERAGED:
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
            # its peer takes seconds
            rounds = min(args.rounds, 3) if case.op == "transport_chain" else args.rounds
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
