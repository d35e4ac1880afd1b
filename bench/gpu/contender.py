"""python -m bench.gpu.contender: times contenders, one request a line, for bench.gpu.

A request is {"rates": true}, or {"name": contender, "case": a Case's fields, "exact": file}; the
file has the exact result, and is written by whoever comes first. Every answer is one line of JSON
on stdout; what libraries print goes to stderr.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import dfkernels as df
from tools.op_table import TABLE

from .. import derivatives
from . import measure, peers, ways
from .cases import EXACT_QUERIES, Case

SECONDS = 0.2  # of runs that are timed


class Bench(NamedTuple):
    """How a function is timed: on a GPU by events and graphs, in tests by stand-ins."""

    timer: Callable[[Callable, float], list[float]]
    capture: Callable[[Callable], tuple[Callable, bool]]
    kernels: Callable[[Callable], list]
    device: str
    memory: int


def ours(case: Case, inputs: dict) -> Callable:
    """The public op, as the user calls it, or a derivative of it."""
    if case.derivative:
        return peers.derived(derivatives.ours, case.derivative, inputs)
    if case.way:
        return ways.ours(case, inputs)
    if case.op == "posterior":
        return lambda: df.ops.posterior(**inputs).mean
    return lambda: getattr(df.ops, case.op)(**inputs, **case.options)


def exact_result(case: Case, inputs: dict) -> torch.Tensor:
    """The last queries in float64; for a posterior their means, for chains where they end. All of a
    derivative."""
    if case.derivative:
        double = {k: t.double() for k, t in inputs.items()}
        return peers.derived(derivatives.by_gemm, case.derivative, double)()
    if case.way:
        return ways.exact(case, inputs)
    whole = ("y", "alpha", "sigma") if case.op == "transport_chain" else ("y", "values")
    last = {k: t if k in whole else t[-EXACT_QUERIES:] for k, t in inputs.items()}
    if case.op in ("log_prob", "draw"):
        numbers = torch.arange(case.B, device=inputs["x"].device)[-EXACT_QUERIES:]
        more = {**case.options, "queries": numbers} if case.op == "draw" else {}
        return TABLE[case.op].reference(**{k: t.double() for k, t in last.items()}, **more)
    if case.op not in peers.REFERENCES:
        return measure.exact(case.op, **last)
    out = peers.REFERENCES[case.op](**{k: t.double() for k, t in last.items()}, **case.options)
    return out[0] if isinstance(out, tuple) else out


def _exact(case: Case, inputs: dict, file: str | None) -> torch.Tensor:
    if file is not None and Path(file).exists():
        return torch.load(file, map_location=inputs[next(iter(inputs))].device)
    want = exact_result(case, inputs)
    if file is not None:
        torch.save(want, file)
    return want


def timed(name: str, case: Case, bench: Bench, file: str | None = None) -> dict[str, Any]:
    """A contender's median, spread and error, and for ours the kernels; or why it cannot run."""
    case = case.within(bench.memory)
    if (needed := peers.bytes_needed(case, name)) > 0.8 * bench.memory:
        return {"skipped": f"needs {needed / 2**30:.0f} GiB for [B, N] arrays"}
    inputs = case.inputs(bench.device)
    try:
        want = _exact(case, inputs, file)
        mine = name == "dfkernels"
        function = ours(case, inputs) if mine else peers.contender(name, case, inputs)
        out = function()
        out = out[0] if isinstance(out, tuple) else out
        other = name in peers.INCOMPARABLE or (not mine and case.op == "draw")
        last = out if case.derivative else out[-EXACT_QUERIES:]
        error = None if other else measure.relative_error(last, want)
        found = {"kernels": bench.kernels(function)} if mine else {}
        run, as_graph = bench.capture(function)
        times = bench.timer(run, SECONDS)
        took = {"ms": statistics.median(times), "least_ms": min(times), "runs": len(times)}
        return {**took, "graph": as_graph, "error": error, **found}
    except Exception as error:  # another's package, out of memory, a compiler
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}


def answer(request: dict[str, Any], bench: Bench) -> dict[str, Any]:
    with torch.no_grad():
        if "rates" in request:
            return measure.rates(bench.timer)
        return timed(request["name"], Case(**request["case"]), bench, request["exact"])


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch._dynamo.config.recompile_limit = 1000
    memory = torch.cuda.get_device_properties(0).total_memory
    bench = Bench(measure.Events(), measure.graphed, measure.kernels, "cuda", memory)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), bench)), file=answers, flush=True)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
