"""python -m bench.triton_budget [op ...]: what every Triton kernel takes of a GPU, found without one.

Compiles all variants of all ops for four compute capabilities and writes registers, spills and shared memory to
bench/results/triton_budget.csv, the budget that tests/test_triton_compile.py keeps them to.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGET = ROOT / "bench" / "results" / "triton_budget.csv"
CAPABILITIES = (80, 90, 100, 120)
KEY = ("triton", "op", "variant", "cc")
COUNTS = ("registers", "stack", "loop_spills", "shared")


def ops() -> list[str]:
    """Those that have a Triton kernel."""
    return sorted(p.parent.name for p in (ROOT / "dfkernels" / "ops").glob("*/triton.py"))


def compiled(variant, cc: int):
    """The variant for compute capability cc, pointers aligned to 16 bytes as torch's are."""
    import triton
    from triton.backends.compiler import GPUTarget

    aligned = [n for n, kind in variant.signature.items() if kind.startswith("*") or n in variant.divisible]
    names = variant.kernel.arg_names
    signature = {name: variant.signature[name] for name in names}  # its order is that of the arguments
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = triton.compiler.ASTSource(variant.kernel, signature, variant.constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", cc, 32), options=variant.options)


def tool(name: str, *arguments: str) -> str:
    """The output of one of the NVIDIA tools that Triton carries."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def loop_spills(sass: str) -> int:
    """Instructions that touch local memory between the target of a backward branch and the branch."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
    local = [int(at, 16) for at, text in lines if re.search(r"\b(LDL|STL)\b", text)]
    loops = []
    for at, text in lines:
        target = re.search(r"\bBRA\S* .*?(0x[0-9a-f]+)", text)
        if target and int(target.group(1), 16) < int(at, 16):
            loops.append((int(target.group(1), 16), int(at, 16)))
    return sum(any(first <= at <= last for first, last in loops) for at in local)


def resources(kernel) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = dict(re.findall(r"(REG|STACK):(\d+)", tool("cuobjdump", "-res-usage", file.name)))
        stack = int(usage["STACK"])
        spills = loop_spills(tool("cuobjdump", "-sass", file.name)) if stack else 0
    shared = kernel.metadata.shared
    return {"registers": int(usage["REG"]), "stack": stack, "loop_spills": spills, "shared": shared}


def measure_here(names, capabilities) -> list[dict]:
    import triton

    rows = []
    for op in names:
        module = importlib.import_module(f"dfkernels.ops.{op}.triton")
        for cc in capabilities:
            for variant in module.variants(cc):
                key = {"triton": triton.__version__, "op": op, "variant": variant.name, "cc": cc}
                try:
                    rows.append({**key, **resources(compiled(variant, cc))})
                except Exception as error:
                    raise RuntimeError(f"{op}, {variant.name}, cc {cc}: {error}") from error
    return rows


def measure(names) -> list[dict]:
    """All variants of the ops; every capability in a process of its own, without the interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_DISABLE_LINE_INFO": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    command = [sys.executable, "-m", "bench.triton_budget", *names, "--json", "--cc"]
    running = []
    for cc in CAPABILITIES:
        out = tempfile.TemporaryFile("w+")
        error = tempfile.TemporaryFile("w+")
        process = subprocess.Popen([*command, str(cc)], env=environment, cwd=ROOT, stdout=out, stderr=error)
        running.append((process, out, error))
    rows = []
    for process, out, error in running:
        code = process.wait()
        out.seek(0), error.seek(0)
        if code:
            raise RuntimeError(error.read()[-3000:])
        rows += json.load(out)
    return sorted(rows, key=lambda row: tuple(row[k] for k in KEY))


def read(path: Path = BUDGET) -> list[dict]:
    with path.open(newline="") as file:
        return [{**row, **{k: int(row[k]) for k in ("cc", *COUNTS)}} for row in csv.DictReader(file)]


def write(rows: list[dict], path: Path = BUDGET) -> None:
    """Replaces what was known of these ops with this Triton; the rest stays."""
    new = {(row["triton"], row["op"]) for row in rows}
    kept = [row for row in read(path) if (row["triton"], row["op"]) not in new] if path.exists() else []
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, (*KEY, *COUNTS), lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(kept + rows, key=lambda row: tuple(row[k] for k in KEY)))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.triton_budget", description=__doc__.splitlines()[0]
    )
    parser.add_argument("ops", nargs="*", metavar="op", default=ops(), help=f"of {', '.join(ops())}")
    parser.add_argument("--cc", type=int, nargs="*", default=CAPABILITIES, help="compute capabilities")
    parser.add_argument("--json", action="store_true", help="print the rows and write nothing")
    args = parser.parse_args()
    if args.json:
        json.dump(measure_here(args.ops, args.cc), sys.stdout)
        return
    rows = measure(args.ops)
    write(rows)
    print(f"{BUDGET.relative_to(ROOT)}: {len(rows)} kernels")


if __name__ == "__main__":
    main()
