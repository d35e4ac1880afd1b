"""python -m tests: the whole suite on the best instruction set, then the quick tests of the kernels
once for every other one that this machine has, and those of the core once without the compiled
part.

Tests run side by side, a process per core, each with its share of the threads. DFKERNELS_ISA or
DFKERNELS_NATIVE=0, set by the caller, is what the whole suite runs on. Arguments go to pytest in
every pass:
`python -m tests -m "not slow"`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
QUICK = ("-m", "not slow")
# Values, bounds and bits that the CPU kernels of one instruction set compute.
KERNELS = (
    "tests/test_reference.py",
    "tests/test_kernels.py",
    "tests/test_accuracy.py",
    "tests/test_lists.py",
    "tests/test_pair_atoms.py",
    "tests/test_pair_kernels.py",
    "tests/test_certified.py",
    "tests/test_transport_chain.py",
)
# What has to be the same where nothing is compiled.
CORE = (
    "tests/test_reference.py",
    "tests/test_errors.py",
    "tests/test_cloud.py",
    "tests/test_fisher.py",
)


def instruction_sets() -> list[str]:
    """The compiled levels that this CPU has, the one in use first; empty without the compiled
    part."""
    from dfkernels._torch import native

    info = native.info()
    if not info:
        return []
    levels = info["isa_levels"]
    return levels[levels.index(info["isa"]) :: -1]


def passes() -> list[tuple[str, dict[str, str], tuple[str, ...]]]:
    """(what is said of it, environment, arguments) of every run of pytest."""
    levels = instruction_sets()
    if not levels:
        return [("all tests, without the compiled part", {}, ())]
    found = [(f"all tests, DFKERNELS_ISA={levels[0]}", {}, ())]
    if "DFKERNELS_ISA" not in os.environ:
        for isa in levels[1:]:
            found.append(
                (f"kernels, DFKERNELS_ISA={isa}", {"DFKERNELS_ISA": isa}, (*QUICK, *KERNELS))
            )
    found.append(("core, DFKERNELS_NATIVE=0", {"DFKERNELS_NATIVE": "0"}, (*QUICK, *CORE)))
    return found


def main(arguments: list[str]) -> int:
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    workers = min(cores, 8)
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // workers)))}
    # A file stays in one process, since its tests may look at one long run; files with slow tests
    # come first.
    by_file = ["--dist", "loadscope", "--no-loadscope-reorder"]
    side_by_side = ["-n", str(workers), *by_file] if workers > 1 else []
    worst = 0
    for name, environment, chosen in passes():
        print(f"\n=== {name}", flush=True)
        command = [sys.executable, "-m", "pytest", *side_by_side, *chosen, *arguments]
        code = subprocess.run(
            command, cwd=HERE.parent, env=os.environ | threads | environment
        ).returncode
        worst = max(worst, abs(code))
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
