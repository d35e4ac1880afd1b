"""What a run was measured on, and runs that are held to a smaller instruction set than the CPU has.

Libraries choose their instructions once, by variables of the environment. `hold` therefore starts
the process anew, with those that each part reads: our kernels, ATen and torch.compile, MKL, oneDNN.
On AMD's CPUs MKL multiplies matrices with AVX2 whatever its variable says.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

import dfkernels as df
from dfkernels._torch import native
from experiments.text import processor

RESULTS = Path(__file__).parent / "results"
INSTRUCTIONS = {"v4": "AVX-512", "v3": "AVX2", "base": "x86-64"}
FILES = {"v4": "avx512", "v3": "avx2"}  # names of their results files
FLAGS = {  # of /proc/cpuinfo: those by which the levels of x86-64 differ
    "v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "v3": {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"},
}
HELD = {
    "v3": {
        "DFKERNELS_ISA": "v3",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "TORCHINDUCTOR_CPP_MARCH": "x86-64-v3",
    },
    "base": {
        "DFKERNELS_ISA": "base",
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "TORCHINDUCTOR_CPP_MARCH": "x86-64",
    },
}


def cpu_isa() -> str:
    """The best instruction set that the CPU has, used or not: base, v3 or v4."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    lines = (line.partition(":")[2] for line in text.splitlines() if line.startswith("flags"))
    found = set(next(lines, "").split())
    return next((isa for isa, needed in FLAGS.items() if needed <= found), "base")


def hold(isa: str | None) -> str:
    """Holds the run to an instruction set, ours and the peers alike, and returns its name.

    Returns if there is nothing to do, else starts the same command anew and does not return.

    Args:
        isa: base or v3; None for the one that our kernels use.
    """
    used, why = native.isa()
    isa = isa or used
    if not isa:
        sys.exit(why)
    held = isa in HELD and platform.machine() == "x86_64" and isa != cpu_isa()
    wanted = HELD[isa] if held else {}
    if any(os.environ.get(k) != v for k, v in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | wanted)
    if isa != used:
        sys.exit(f"our kernels use {used}, not {isa}: is DFKERNELS_ISA set?")
    return isa


def results(kind: str, isa: str) -> Path:
    """The results file of a benchmark on machines of an instruction set: cpu-avx512.csv."""
    return RESULTS / f"{kind}-{FILES.get(isa, isa)}.csv"


def columns(threads: int, rates: dict[str, float]) -> dict:
    """What every row of a results file says of its run."""
    isa = native.isa()[0]
    return {
        "cpu": processor(),
        "cpu_isa": cpu_isa() if isa in INSTRUCTIONS else isa,
        "threads": threads,
        "isa": isa,
        "torch": torch.__version__,
        "dfkernels": df.__version__,
        "commit": _commit(),
        "date": date.today().isoformat(),
        **{k: f"{v:.1f}" for k, v in rates.items()},
    }


def _commit() -> str:
    """The checkout's commit, with "-dirty" where the code has changed since; results and tables, as
    an earlier run writes them, are no code.
    """
    git = lambda *command: subprocess.run(
        ["git", *command], capture_output=True, text=True, cwd=RESULTS.parent.parent
    )
    commit = git("describe", "--always").stdout.strip()
    changed = git("diff", "--quiet", "HEAD", "--", "csrc", "dfkernels", "bench/*.py").returncode
    return f"{commit}-dirty" if commit and changed else commit


def text(row: dict) -> str:
    """What the numbers of a results file were measured on, for the documents."""
    used, of_cpu = (INSTRUCTIONS.get(row[k], row[k]) for k in ("isa", "cpu_isa"))
    used = used if used == of_cpu else f"{of_cpu} CPU held to {used}"
    return f"{row['cpu']}, {row['threads']} threads ({used}), torch {row['torch']}"


def origin(row: dict) -> str:
    """On what, when, and at which commit the numbers of a results file were measured."""
    return f"{text(row)}, {row['date']}, commit {row['commit']}"
