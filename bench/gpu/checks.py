"""What is found about the machine and the kernels' correctness: versions, the CUDA tests,
compute-sanitizer."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import dfkernels as df

from .report import ROOT

WORKERS = 12  # processes of CUDA tests: each has its own context, of half a gigabyte
SMALL = """
import torch
import dfkernels as df
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
many = torch.randn(70, 5, device="cuda")
ops.posterior(many, y[:, :5], 1.0, 1.0), ops.posterior(many, y[:, :5], 1.0, 0.01)
ops.fisher_matvec(many, y[:, :5], many, 1.0, 1.0), ops.log_prob(many, y[:, :5], 1.0, 1.0)
for form in ("paper", "centred"):
    ops.endpoint_matvec(v, x, x + 1, 0.9, 0.5, form=form)
ops.matched_trace(x[:, 0], x, 0.9, 0.5), ops.matched_trace(x[:, 0], x, 0.9, 0.5, x=x, form="paper")
lists = {"atoms": torch.arange(300, device="cuda").repeat(5),
         "counts": torch.full((5,), 300, device="cuda")}
ops.posterior(x, y, 1.0, 1.0, **lists), ops.fisher_matvec(x, y, v, 1.0, 1.0, **lists)
level = torch.ones(5, device="cuda")
df.PointCloud(y)._select(x, level, 0.3 * level, 1e-6)
levels = torch.tensor([0.3, 0.7, 1.0], device="cuda")
for d in (2, 13):
    ops.transport_chain(x[:, :d], y[:, :d], levels, 1.3 - levels)
torch.cuda.synchronize()
"""
HAZARD = re.compile(
    r"Potential (?P<kind>\w+) hazard detected at (?P<place>.*?) :\s*\n"
    r"=+\s+\w+ Thread \((?P<first>\d+),0,0\) at (?P<one>.+)\n"
    r"=+\s+\w+ Thread \((?P<second>\d+),0,0\) at (?P<other>.+)\n"
    r"(?:=+\s+Current Value : (?P<current>\S+), Incoming Value : (?P<incoming>\S+))?"
)


def end(process: subprocess.Popen) -> None:
    """Kills a process that was started as the leader of a session, and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def shell(*command: str, timeout: float | None = None, **more) -> tuple[int, str]:
    """(exit status, both outputs); 124 when it takes too long, and nothing that it has started is
    left."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **more,
            )
        except OSError as error:
            return 127, str(error)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = 124
        finally:
            end(process)
        said.seek(0)
        return code, said.read()


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
    code, text = shell(*query, timeout=20)
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
    code, text = shell("git", "describe", "--always", "--dirty", timeout=20)
    return text.strip() if code == 0 else "unknown"


def tests(timeout: float) -> dict:
    """The CUDA test set, in parallel where pytest-xdist is installed; "failed" is -1 where it did
    not come to an end."""
    start = time.monotonic()
    workers = ("-n", str(WORKERS)) if importlib.util.find_spec("xdist") else ()
    code, text = shell(
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        *workers,
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


def races(text: str) -> tuple[int, list[str]]:
    """What racecheck has reported: (writes of one value by several lanes, all other hazards).

    From 3.6 on, Triton lets all lanes of a warp store the warp's part of a reduction, or a
    replicated layout, at the same place in shared memory (triton-lang/triton, issues 7264 and
    11614). That is a write-write hazard of one instruction with itself within a warp. For sums and
    maxima the lanes hold the same number, and nothing depends on the order; with different numbers
    it would be a race, and counts as one.
    """
    replicated, others = 0, []
    for found in HAZARD.finditer(text):
        one_warp = int(found["first"]) // 32 == int(found["second"]) // 32
        same = found["current"] is not None and found["current"] == found["incoming"]
        if found["kind"] == "WAW" and found["one"] == found["other"] and one_warp and same:
            replicated += 1
        else:
            others.append(" ".join(found[0].replace("=========", "").split()))
    return replicated, others


def verdict(kind: str, code: int, text: str) -> str:
    """What one tool of compute-sanitizer found: "clean", or what is wrong."""
    if code == 124:
        return "no time"
    replicated, others = races(text) if kind == "racecheck" else (0, [])
    if code == 9 and replicated and not others and text.count(" hazard detected") == replicated:
        return f"clean but for {replicated} writes of the same value by lanes of one warp"
    return "clean" if code == 0 else f"exit {code}: {' | '.join(others)[:1500] or text[-1500:]}"


def sanitizer(deadline: float) -> dict:
    """compute-sanitizer on small calls of every op: {tool: "clean" or what it said}."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return {}
    found = {}
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    for kind, more in (("memcheck", ()), ("racecheck", ("--racecheck-report", "hazard"))):
        command = (tool, "--tool", kind, *more, "--error-exitcode", "9", sys.executable, "-c")
        left = max(1, (deadline - time.monotonic()) / (2 - len(found)))
        found[kind] = verdict(kind, *shell(*command, SMALL, timeout=left, env=environment))
    return found
