"""python -m bench.gpu: the whole check of the GPU kernels, in at most six minutes on one GPU.

Compiles the kernels in parallel, runs the CUDA tests in parallel, times every op and its peers over
a grid, the most important cases first, and runs compute-sanitizer where there is one. Peers that
compile for long come last. Every contender has a process and a time limit of its own, and the file
is written after every result, so that nothing that hangs, crashes or comes too late takes anything
else along.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch

from . import checks, peers, report
from .cases import Case, chosen, floor
from .processes import Process

COMPILERS = 16  # processes that compile kernels
COMPILING, TESTING, SANITIZING = 60.0, 100.0, 45.0  # seconds at most, of six minutes
LIMIT = {"dfkernels": 30.0, "compile": 40.0}  # seconds for one case; others 15


def compile_kernels(pattern: str, seconds: float) -> dict:
    """The kernels of the chosen cases, into Triton's cache, by processes side by side."""
    start = time.monotonic()
    command = (sys.executable, "-m", "bench.gpu.compile")
    found: dict[str, Any] = {"kernels": 0, "failed": {}}
    run = lambda i: checks.shell(*command, str(i), str(COMPILERS), pattern, timeout=seconds)
    with ThreadPoolExecutor(COMPILERS) as pool:
        for i, (code, text) in enumerate(pool.map(run, range(COMPILERS))):
            if code:
                found["failed"][f"share {i}"] = f"exit {code}: {text[-300:]}"
                continue
            said = json.loads(text.strip().rpartition("\n")[2])
            found["kernels"] += said["kernels"]
            found["failed"] |= said["failed"]
    return {**found, "seconds": round(time.monotonic() - start, 1)}


def new_row(case: Case, rates: dict) -> dict:
    """What is known of a case before anything has run."""
    least, bound = floor(case, rates)
    work = {"bytes": case.bytes, "flops": case.flops, "floor_ms": least, "bound": bound}
    return {**asdict(case), "sigma": case.sigma, **work, "contenders": {}}


def measure(
    cases: list[Case],
    result: dict,
    ask: Callable[[str, dict, float], dict],
    show: Callable[[dict], None],
) -> None:
    """Fills result["rows"]: ours and the quick peers case by case, then the others.

    Args:
        cases: the most important first.
        result: has the rates and the machine's memory.
        ask: takes a contender, a request and seconds, returns the answer.
        show: is called with a row whenever it has something new.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for i, case in enumerate(cases):
            case = case.within(result["machine"]["memory"])
            row = new_row(case, result["rates"])
            rows.append((case, row, str(Path(folder, f"{i}.pt"))))
        result["rows"] = []
        for group in (("dfkernels", *peers.FIRST), peers.LATER):
            for case, row, file in rows:
                mine = [name for name in ("dfkernels", *peers.names(case)) if name in group]
                for name in mine:
                    request = {"name": name, "case": asdict(case), "exact": file}
                    found = ask(name, request, LIMIT.get(name, 15.0))
                    if "kernels" in found:
                        row["kernels"] = found.pop("kernels")
                    row["contenders"][name] = found
                if row not in result["rows"]:
                    result["rows"].append(row)
                if mine:
                    show(row)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--minutes", type=float, default=6.0, help="the whole run (default 6)")
    parser.add_argument(
        "--only",
        default="",
        metavar="PATTERN",
        help="cases whose name has this regular expression, without tests: for tuning",
    )
    parser.add_argument(
        "--against", type=Path, help="a file of an earlier run, compared with row by row"
    )
    parser.add_argument(
        "--out", type=Path, help="the file (default: bench/results/gpu/<gpu>-<date>.json)"
    )
    return parser.parse_args()


def run(args: argparse.Namespace, result: dict, path: Path | None, end: float) -> None:
    """Everything that takes time, into the result and the file."""
    left = lambda: end - time.monotonic()

    def save() -> None:
        if path:
            report.write(result, path)

    result["compiled"] = compile_kernels(args.only, min(COMPILING, left()))
    print("compiled: {kernels} kernels, {seconds} s {failed}".format(**result["compiled"]))
    if not args.only:
        result["tests"] = checks.tests(timeout=min(TESTING, left() / 2))
        print(
            "tests: {passed} passed, {failed} failed, {seconds} s\n{tail}".format(
                **result["tests"]
            ),
            flush=True,
        )
    save()
    deadline = end - (0 if args.only else SANITIZING)
    processes = {name: Process() for name in ("dfkernels", *peers.FIRST, *peers.LATER)}
    ask = lambda name, request, seconds: processes[name].ask(request, seconds, deadline)
    for process in processes.values():
        process.start()  # side by side: each takes seconds
    try:
        result["rates"] = ask("dfkernels", {"rates": True}, 30.0)
        if "copy_gbs" not in result["rates"]:
            raise RuntimeError(f"the device's rates were not found: {result['rates']}")
        print(", ".join(f"{k} {v:,.0f}" for k, v in result["rates"].items()), flush=True)
        old = json.loads(args.against.read_text()) if args.against else None

        def show(row: dict) -> None:
            result["targets"] = report.targets(result)
            save()
            print(report.line(row) + report.against(row, old), flush=True)

        measure(chosen(args.only), result, ask, show)
        if old:
            print(report.against_all(result, old))
    finally:
        for process in processes.values():
            process.close()
    if not args.only:
        result["sanitizer"] = checks.sanitizer(end)
        save()
        print(f"compute-sanitizer: {result['sanitizer'] or 'not here'}")


def main() -> int:
    args = parsed()
    if not torch.cuda.is_available():
        print(
            "python -m bench.gpu: torch sees no CUDA device; nothing was measured", file=sys.stderr
        )
        return 2
    if not chosen(args.only):
        print(f"python -m bench.gpu: no case has {args.only!r} in its name", file=sys.stderr)
        return 2
    end = time.monotonic() + 60 * args.minutes
    about, today = checks.machine(), date.today().isoformat()
    path = args.out
    if path is None and not args.only:
        name = re.sub("[^a-z0-9]+", "-", about["gpu"].lower()).strip("-")
        path = report.RESULTS / f"{name}-{today}.json"
    result: dict[str, Any] = {
        "machine": about,
        "commit": checks.commit(),
        "date": today,
        "rows": [],
    }
    run(args, result, path, end)
    print("\n".join(report.summary(result)))
    mine = [row["contenders"]["dfkernels"] for row in result["rows"]]
    late = sum("skipped" in m for m in mine)
    wrong = sum(not m.get("error", 1) < 1e-3 for m in mine) - late
    print(f"{path}: {len(mine)} cases, {late} without time; {wrong} of ours wrong or failed")
    return int(bool(wrong or result.get("tests", {}).get("failed")))


if __name__ == "__main__":
    sys.exit(main())
