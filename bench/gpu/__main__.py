"""python -m bench.gpu: the whole check of the GPU kernels, in under nine minutes on one GPU.

The CUDA tests, every op over a grid against its roofline and its peers, then compute-sanitizer on
small calls where there is one. Writes one JSON file after every case, so that a run that is cut
short leaves what it has.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch

import dfkernels as df
from tools.op_table import TABLE

from .. import derivatives
from . import peers, report
from .cases import EXACT_QUERIES, Case, floor, grid

SMALL = """
import torch
from dfkernels import ops
x, y, v = (torch.randn(*s, device="cuda") for s in ((5, 37), (300, 37), (5, 2, 37)))
for storage in (torch.float32, torch.uint8):
    args = 100 + x, (100 + 20 * y).clamp(0, 255).to(storage)
    ops.posterior(*args, 1.0, 50.0), ops.fisher_matvec(*args, v, 1.0, 50.0)
    ops.fisher_diagonal(*args, 1.0, 50.0), ops.fisher_dense(*args, 1.0, 50.0)
    ops.log_prob(*args, 1.0, 50.0), ops.draw(*args, 1.0, 50.0, seed=1)
leaf, moved = x.clone().requires_grad_(), y.clone().requires_grad_()
for out in (
    ops.posterior(leaf, moved, 1.0, 1.0).fisher_trace,
    ops.fisher_matvec(leaf, moved, v, 1.0, 1.0),
    ops.fisher_diagonal(leaf, moved, 1.0, 1.0),
):
    torch.autograd.grad(out.sum(), (leaf, moved))
of = lambda x, y: ops.fisher_diagonal(x, y, 1.0, 1.0)
torch.func.jvp(of, (x, y), (x, y))
for form in ("paper", "centred"):
    ops.endpoint_matvec(v, x, x + 1, 0.9, 0.5, form=form)
ops.matched_trace(x[:, 0], x, 0.9, 0.5), ops.matched_trace(x[:, 0], x, 0.9, 0.5, x=x, form="paper")
levels = torch.tensor([0.3, 0.7, 1.0], device="cuda")
for d in (2, 13):
    ops.transport_chain(x[:, :d], y[:, :d], levels, 1.3 - levels)
torch.cuda.synchronize()
"""


def shell(*command: str, timeout: float | None = None, **more) -> tuple[int, str]:
    """(exit status, both outputs); 124 when it takes too long."""
    try:
        done = subprocess.run(
            command,
            cwd=report.ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            **more,
        )
        return done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        said = late.stdout or ""
        return 124, said if isinstance(said, str) else said.decode(errors="replace")
    except OSError as error:
        return 127, str(error)


def machine() -> dict:
    import triton

    p = torch.cuda.get_device_properties(0)
    query = (
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.max.sm,power.limit",
        "--format=csv,noheader",
        "-i",
        "0",
    )
    code, text = shell(*query)
    driver, clock, power = (
        [*text.strip().split(", "), "", ""][:3] if code == 0 else ("unknown", "", "")
    )
    return {
        "gpu": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory": p.total_memory,
        "l2": p.L2_cache_size,
        "driver": driver,
        "max_sm_clock": clock,
        "power_limit": power,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "dfkernels": df.__version__,
    }


def commit() -> str:
    code, text = shell("git", "describe", "--always", "--dirty")
    return text.strip() if code == 0 else "unknown"


def tests(timeout: float) -> dict:
    """The CUDA test set; "failed" is -1 where it did not come to an end."""
    start = time.monotonic()
    code, text = shell(
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "tests/test_cuda.py",
        timeout=timeout,
    )
    count = lambda word: sum(
        map(int, re.findall(rf"(\d+) {word}", text.strip().rpartition("\n")[2]))
    )
    failed = count("failed") + count("errors?") or (0 if code == 0 else -1)
    seconds = round(time.monotonic() - start, 1)
    return {
        "passed": count("passed"),
        "failed": failed,
        "seconds": seconds,
        "tail": text[-4000:] if code else "",
    }


def sanitizer(deadline: float) -> dict:
    """compute-sanitizer on small calls of every op: {tool: "clean" or what it said}."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return {}
    found = {}
    environment = os.environ | {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": str(report.ROOT),
    }
    for kind in ("memcheck", "racecheck"):
        command = (tool, "--tool", kind, "--error-exitcode", "9", sys.executable, "-c", SMALL)
        code, text = shell(*command, timeout=max(1, deadline - time.monotonic()), env=environment)
        found[kind] = {0: "clean", 124: "no time"}.get(code, f"exit {code}: {text[-1500:]}")
    return found


def exact_result(case: Case, inputs: dict):
    """The last queries in float64; for a posterior their means, for chains where they end. All of a
    derivative."""
    from . import measure

    if case.derivative:
        double = {k: t.double() for k, t in inputs.items()}
        return peers.derived(derivatives.by_gemm, case.derivative, double)()
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


def ours(case: Case, inputs: dict):
    """The public op, as the user calls it, or a derivative of it."""
    if case.derivative:
        return peers.derived(derivatives.ours, case.derivative, inputs)
    if case.op == "posterior":
        return lambda: df.ops.posterior(**inputs).mean
    return lambda: getattr(df.ops, case.op)(**inputs, **case.options)


def measure_case(
    case: Case, rates: dict, timer, capture, device, memory: int, deadline: float
) -> dict:
    """One row: every contender's median, spread and error; a contender that cannot run says why."""
    from . import measure

    case = case.within(memory)
    least, bound = floor(case, rates)
    work = {"bytes": case.bytes, "flops": case.flops, "floor_ms": least, "bound": bound}
    contenders: dict[str, dict] = {}
    row = {**asdict(case), "sigma": case.sigma, **work, "contenders": contenders}
    if time.monotonic() > deadline:
        contenders["dfkernels"] = {"skipped": "out of time"}
        return row
    inputs = case.inputs(device)
    want = exact_result(case, inputs)
    makers = {"dfkernels": lambda: ours(case, inputs), **peers.contenders(case, inputs)}
    for name, make in makers.items():
        if time.monotonic() > deadline:
            contenders[name] = {"skipped": "out of time"}
            continue
        if (needed := peers.bytes_needed(case, name)) > 0.8 * memory:
            contenders[name] = {"skipped": f"needs {needed / 2**30:.0f} GiB for [B, N] arrays"}
            continue
        try:
            function = make()
            out = function()
            out = out[0] if isinstance(out, tuple) else out
            other = name in peers.INCOMPARABLE or (name != "dfkernels" and case.op == "draw")
            last = out if case.derivative else out[-EXACT_QUERIES:]
            error = None if other else measure.relative_error(last, want)
            del out
            run, as_graph = capture(function)
            times = timer(run, 0.3)
            found = {"ms": statistics.median(times), "least_ms": min(times), "runs": len(times)}
            contenders[name] = {**found, "graph": as_graph, "error": error}
            del run, function
        except Exception as error:  # another's package, out of memory, a compiler
            contenders[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        if device != "cpu":
            gc.collect()
            torch.cuda.empty_cache()
    return row


def line(row: dict) -> str:
    name = f"{row['op']} B={row['B']} N={row['N']} d={row['d']} K={row['K']} "
    name += row["form"] or f"{row['storage']} {row['noise']} {row['derivative']}".rstrip()
    mine = row["contenders"]["dfkernels"]
    if "ms" not in mine:
        return f"{name}: {mine}"
    peer = report.best(row)
    ratio = "" if peer is None else f"  {peer[0] / mine['ms']:.2f} x faster than {peer[1]}"
    over = mine["ms"] / row["floor_ms"]
    return (
        f"{name}: {mine['ms']:.4g} ms  {over:.2f} x floor ({row['bound']})  error"
        f" {mine['error']:.1e}{ratio}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--minutes", type=float, default=8.5, help="the whole run (default 8.5)")
    parser.add_argument(
        "--only", default="", help="cases whose name contains this, without tests: for tuning"
    )
    parser.add_argument(
        "--out", type=Path, help="the file (default: bench/results/gpu-<name>.json)"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "python -m bench.gpu: torch sees no CUDA device; nothing was measured", file=sys.stderr
        )
        return 2
    from . import measure

    end = time.monotonic() + 60 * args.minutes
    about = machine()
    path = args.out
    if path is None and not args.only:
        path = report.RESULTS / f"gpu-{re.sub('[^a-z0-9]+', '-', about['gpu'].lower())}.json"
    result: dict[str, Any] = {
        "machine": about,
        "commit": commit(),
        "date": date.today().isoformat(),
        "rows": [],
    }
    if not args.only:
        result["tests"] = tests(timeout=60 * args.minutes / 3)
        print(
            "tests: {passed} passed, {failed} failed, {seconds} s\n{tail}".format(
                **result["tests"]
            ),
            flush=True,
        )
    timer = measure.Events()
    torch._dynamo.config.recompile_limit = 1000
    with torch.no_grad():
        result["rates"] = measure.rates(timer)
        print(", ".join(f"{k} {v:,.0f}" for k, v in result["rates"].items()), flush=True)
        deadline = end if args.only else end - 60  # compute-sanitizer has the last minute
        for case in grid():
            if args.only not in case.name:
                continue
            row = measure_case(
                case, result["rates"], timer, measure.graphed, "cuda", about["memory"], deadline
            )
            result["rows"].append(row)
            result["targets"] = report.targets(result)
            if path:
                report.write(result, path)
            print(line(row), flush=True)
    if not args.only:
        result["sanitizer"] = sanitizer(end)
        report.write(result, path)
        print(f"compute-sanitizer: {result['sanitizer'] or 'not here'}")
    print("\n".join(report.summary(result)))
    mine = [row["contenders"]["dfkernels"] for row in result["rows"]]
    late = sum("skipped" in m for m in mine)
    wrong = sum(not m.get("error", 1) < 1e-3 for m in mine) - late
    print(f"{path}: {len(mine)} cases, {late} without time; {wrong} of ours wrong or failed")
    return int(bool(wrong or result.get("tests", {}).get("failed")))


if __name__ == "__main__":
    sys.exit(main())
