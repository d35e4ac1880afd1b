"""python -m bench.triton_budget: what every Triton kernel takes of a GPU, found without one.

Records what the launchers launch, on tensors without a device, compiles it for four compute
capabilities and writes registers, spills and shared memory to bench/results/triton_budget.csv, the
budget that tests/test_triton_compile.py keeps them to. The column `source` tells what was compiled:
as long as it is the same, the same compiler makes the same code of it, and it is not compiled
again.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).resolve().parent.parent
BUDGET = ROOT / "bench" / "results" / "triton_budget.csv"
CAPABILITIES = (80, 90, 100, 120)
KEY = ("triton", "file", "kernel", "cc")
COUNTS = ("registers", "stack", "loop_spills", "shared")
COLUMNS = (*KEY, *COUNTS, "source")


# op: shapes (B, N, d, K), or (B, d, K), and dtypes of x and y with which its launcher is called,
# and whether with a log_prior: one for every configuration that it chooses.
SINGLE, DOUBLE = torch.float32, torch.float64
CLOUDS = [
    ((1, 100_000, 3072, 1), SINGLE, SINGLE, False),
    ((4, 1_280_000, 4096, 1), SINGLE, torch.bfloat16, False),
    ((16, 1_280_000, 4096, 1), SINGLE, torch.float16, False),
    ((64, 50_000, 784, 1), SINGLE, torch.uint8, True),
    ((64, 50_000, 3072, 1), SINGLE, SINGLE, False),
    ((4096, 262_144, 1024, 1), SINGLE, torch.bfloat16, False),
    ((64, 50_000, 100, 1), SINGLE, SINGLE, False),
    ((4096, 50_000, 64, 1), SINGLE, SINGLE, True),
    ((65_536, 65_536, 16, 1), SINGLE, SINGLE, False),
    ((65_536, 65_536, 2, 1), SINGLE, SINGLE, True),
    ((1, 1000, 100_000, 1), SINGLE, SINGLE, False),
    ((7, 50_001, 33, 3), SINGLE, SINGLE, True),
    ((16, 1000, 64, 1), DOUBLE, DOUBLE, True),
]
WIDE = [cloud for cloud in CLOUDS if cloud[1] == cloud[2]]
PAIR_KERNELS = ("vjp_queries", "vjp_atoms", "jvp")
CALLS: dict[str, list[tuple[Any, ...]]] = {
    # narrow atoms change only what a load is: not in every op
    "posterior": CLOUDS,
    "log_prob": [cloud for cloud in CLOUDS if cloud[0][0] in (1, 64, 65_536)],
    "average": [cloud for cloud in WIDE if cloud[0][0] in (1, 16, 4096)],
    "draw": [cloud for cloud in WIDE if cloud[0][0] in (1, 16, 65_536)],
    "fisher_matvec": [cloud for cloud in CLOUDS if cloud[2] != torch.uint8],
    "fisher_diagonal": WIDE,
    "fisher_dense": [cloud for cloud in WIDE if cloud[0][0] * cloud[0][2] ** 2 < 2**26],
    "endpoint_matvec": [
        *(
            (shape, SINGLE)
            for shape in ((64, 65_536, 1), (256, 12_288, 1), (4096, 3072, 4), (65_536, 2, 1))
        ),
        *((shape, DOUBLE) for shape in ((8, 65_536, 1), (256, 3072, 1), (65_536, 2, 1))),
    ],
    "matched_trace": [
        *((shape, SINGLE) for shape in ((64, 65_536, 1), (256, 12_288, 1), (65_536, 2, 1))),
        *((shape, DOUBLE) for shape in ((64, 65_536, 1), (65_536, 2, 1))),
    ],
    "transport_chain": [
        ((4096, 3, 1, 1), SINGLE),
        *(((4096, 3, d, 1), dtype) for d in (2, 4) for dtype in (SINGLE, DOUBLE)),
        *(((4096, 64, d, 1), dtype) for d in (8, 16) for dtype in (SINGLE, DOUBLE)),
    ],
    "select_atoms": [
        ((64, 1_000_000, 3072, 1), SINGLE, SINGLE, True),
        ((64, 1_000_000, 3072, 1), SINGLE, SINGLE, False),
        ((64, 50_000, 48, 1), SINGLE, torch.uint8, False),
    ],
}
# lists of atoms: a whole row of every kind, and one that no program holds
LISTS = [
    ((64, 50_000, 3072, 1), SINGLE, SINGLE, False),
    ((64, 50_000, 784, 1), SINGLE, torch.uint8, True),
    ((64, 1_280_000, 4096, 1), SINGLE, torch.bfloat16, False),
    ((64, 50_000, 12_288, 1), SINGLE, SINGLE, True),
    ((65_536, 65_536, 2, 1), SINGLE, SINGLE, False),
    ((16, 1000, 64, 1), DOUBLE, DOUBLE, True),
]
# first derivatives: every tile, in float64 too, and where d is cut
PAIRS = [
    ((1, 50_000, 784, 1), SINGLE, SINGLE, True),
    ((64, 50_000, 784, 2), SINGLE, torch.bfloat16, False),
    ((4096, 50_000, 64, 1), SINGLE, SINGLE, True),
    ((65_536, 65_536, 16, 1), SINGLE, SINGLE, False),
    ((16, 1000, 64, 1), DOUBLE, DOUBLE, True),
]
LAUNCHERS = {
    "select_atoms": ("certified.triton", "search"),
    "dropped_weight": ("certified.triton", "weighed"),  # what comes after it needs a device
    **{f"pair_{name}": ("ops.common.triton.pair", name) for name in PAIR_KERNELS},
    **{f"lists_{op}": (f"ops.{op}.triton", "launch") for op in ("posterior", "fisher_matvec")},
}
CALLS |= {f"pair_{name}": PAIRS for name in PAIR_KERNELS}
CALLS["dropped_weight"] = CALLS["select_atoms"][:1]
CALLS |= {name: LISTS for name in LAUNCHERS if name.startswith("lists_")}


class Launch(NamedTuple):
    """A kernel as a launcher called it."""

    kernel: Any
    signature: dict[str, str]  # of every argument: "*fp32", "i32", "constexpr"
    constants: dict[str, Any]
    aligned: list[str]  # pointers to, and integers that are, multiples of 16
    options: dict[str, int]

    @property
    def name(self) -> str:
        kinds = [k[1:] for k in self.signature.values() if k.startswith("*")]
        words = [self.kernel.__name__.removesuffix("_kernel"), "/".join(dict.fromkeys(kinds))]
        flags = {k: self.constants[k] for k in self.signature if k in self.constants}
        for key, value in {**flags, **self.options}.items():
            if key.isupper() or key in ("num_warps", "num_ctas"):
                words.append(f"{key.removeprefix('num_')}={value}")
        return " ".join(words)


def arguments(op: str, shape: tuple[int, ...], dtype, storage: torch.dtype = SINGLE, prior=False):
    """Every way to call an op's launcher with such tensors, which are on no device."""

    def new(*sizes: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    B, d, K = shape[0], *shape[-2:]
    x, level, v = new(B, d), new(B), new(B, K, d)
    if op == "endpoint_matvec":
        yield from ((v, x, x, level, level, form) for form in ("paper", "centred"))
    elif op == "matched_trace":
        yield from ((level, x, x, level, level, form) for form in ("paper", "residual"))
    elif op == "transport_chain":
        steps = [new(*sizes, dtype=DOUBLE) for sizes in ((51,), (51,), (50, 2))]
        for rates in (None, steps[2])[: 1 + (d == 16)]:  # with rates: transposed
            yield x, new(shape[1], d), *steps[:2], None, rates, rates is not None
    else:
        y = new(shape[1], d, dtype=storage)
        affine = (0.5, 1.0) if storage == torch.uint8 else (1.0, 0.0)
        log_prior = new(shape[1]) if prior else None
        if op == "select_atoms":
            yield search_arguments(new, x, y, level, log_prior, *affine)
            return
        if op == "dropped_weight":
            q, _ = search_arguments(new, x, y, level, log_prior, *affine)
            yield q, new(B, shape[1]), new(B, 1), new(B, 1, dtype=torch.bool)
            return
        if op.startswith("pair"):
            yield from pair_arguments(op, new, x, y, v, level, log_prior, *affine)
            return
        rest = (level, level, log_prior, *affine)
        if op == "average":
            yield (x, y, new(shape[1], 10), *rest)
            return
        if op == "draw":
            yield (x, y, *rest, 2**40, new(B, dtype=torch.int64), B)
            return
        lists = equal_lists(B, shape[1]) if op.startswith("lists_") else ()
        yield (x, y, *((v,) if op.endswith("fisher_matvec") else ()), *rest, *lists)


def equal_lists(B: int, N: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of atoms; how many each has is read, so that these are on a device."""
    count = min(N, 1000)
    return torch.arange(count).repeat(B), torch.full((B,), count)


def pair_arguments(op, new, x, y, v, level, log_pi, scale, offset):
    """What the kernels of ops/common/pair_kernels.py take: all cotangents, or all tangents and
    those of the queries alone."""
    shift = new(len(x), dtype=DOUBLE)
    for kind, second in {"posterior": level, "matvec": v, "diagonal": x}.items():
        own = v if kind == "matvec" else None
        head = (x, y, own, level, level, log_pi, scale, offset, shift, x, kind)
        if op == "pair_jvp":
            yield (*head, x, None, own, level, level, None, None, None)
            yield (*head, x, new(*y.shape), own, level, level, log_pi, None, None)
        else:
            square = level if kind == "posterior" else None
            want_y = (True,) if op == "pair_vjp_atoms" else ()
            yield (*head, level, x, second, square, None, None, *want_y)


def search_arguments(new, x, y, level, log_prior, scale, offset):
    """What `search` takes: queries with an index of y, and k."""
    from dfkernels._constants import CODE_TILE
    from dfkernels.certified.bounds import Queries, Sought
    from dfkernels.certified.index import FIELDS, CloudIndex, has_fine_level

    (N, d), fine = y.shape, has_fine_level(y.shape[1], y.element_size())
    sizes: dict[str, int] = {
        "N": N,
        "d": d,
        "K": min(32, d // 4),
        "tiles": -(-N // CODE_TILE),
        "levels": 1 + fine,
    }
    sizes |= {"rows": N * fine, "padded": d * fine}
    index = CloudIndex(
        *(
            new(*(sizes[n] if isinstance(n, str) else n for n in f.shape), dtype=f.dtype)
            for f in FIELDS.values()
        )
    )
    return Queries(Sought(x, y, level, level, log_prior, scale, offset), index, 24.0), 1


def launcher(name: str) -> tuple[Any, tuple[dict[str, bool], ...]]:
    """An op's launcher, and every set of further keywords that it takes."""
    place, function = LAUNCHERS.get(name, (f"ops.{name}.triton", "launch"))
    both = ({"fisher": True}, {"fisher": False}) if name.endswith("fisher_matvec") else ({},)
    return getattr(importlib.import_module(f"dfkernels.{place}"), function), both


SHORT = {"bfloat": "bf", "float": "fp", "uint": "u", "int": "i", "bool": "i1"}


def kind(value) -> str:
    """Triton's type of an argument."""
    if isinstance(value, torch.Tensor):
        name = "*" + str(value.dtype).removeprefix("torch.")
        for long, short in SHORT.items():
            name = name.replace(long, short)
        return name
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def recorded(kernel, values, options) -> Launch:
    """With what Triton derives from the arguments: ones are constants, multiples of 16 are known to
    be."""
    given = dict(zip(kernel.arg_names, values, strict=False)) | options
    options = {k: given.pop(k) for k in options if k not in kernel.arg_names}
    fixed = [p.name for p in kernel.params if p.is_constexpr]
    constants = {
        k: v for k, v in given.items() if k in fixed or v is None or (type(v) is int and v == 1)
    }
    signature = {k: "constexpr" if k in constants else kind(given[k]) for k in kernel.arg_names}
    aligned = [
        k for k, v in given.items() if signature[k][0] == "*" or (type(v) is int and v % 16 == 0)
    ]
    return Launch(kernel, signature, constants, [k for k in aligned if k not in constants], options)


def launches(cc: int) -> dict[tuple[str, str], Launch]:
    """What the launchers run on a GPU of compute capability cc, by file and name."""
    from dfkernels.ops.common.triton import device

    found = {}

    def run(kernel, *values, grid, warmup, **options):
        launch = recorded(kernel, values, options)
        file = kernel.__module__.removeprefix("dfkernels.").removeprefix("ops.")
        found.setdefault((file, launch.name), launch)

    devices = {90: device.DEVICES[cc]}  # the one of tensors that are on no GPU
    with mock.patch.object(JITFunction, "run", run), mock.patch.dict(device.DEVICES, devices):
        for op, calls in CALLS.items():
            launch, both = launcher(op)
            for i, call in enumerate(calls):
                ways = both[: 1 + (i == 0)]  # covariance_matvec is another in its last line only
                for args, more in itertools.product(arguments(op, *call), ways):
                    launch(*args, **more)
    return found


def source_of(launch: Launch):
    """What Triton compiles: the kernel, specialised to its arguments."""
    names = launch.kernel.arg_names
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in launch.aligned}
    return triton.compiler.ASTSource(launch.kernel, launch.signature, launch.constants, attributes)


def digest(launch: Launch) -> str:
    """Of the kernel's source, the functions and constants that it uses, and how it is specialised.

    Triton counts the line where a function begins, so that one which has only moved counts as
    changed.
    """
    whole = f"{source_of(launch).hash()} {sorted(launch.options.items())}"
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def compiled(launch: Launch, cc: int):
    target = GPUTarget("cuda", cc, 32)
    return triton.compile(source_of(launch), target=target, options=launch.options)


def tool(name: str, *arguments: str) -> str:
    """The output of one of the NVIDIA tools that Triton carries."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def loop_spills(sass: str) -> int:
    """Instructions that touch local memory in innermost loops: from a backward branch's target to
    it."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    loops = []
    for at, text in lines:
        target = re.search(r"\bBRA\S* .*?(0x[0-9a-f]+)", text)
        if target and int(target.group(1), 16) < at:
            loops.append((int(target.group(1), 16), at))
    inside = lambda a, b: a != b and b[0] <= a[0] and a[1] <= b[1]
    innermost = [loop for loop in loops if not any(inside(other, loop) for other in loops)]
    local = [at for at, text in lines if re.search(r"\b(LDL|STL)\b", text)]
    return sum(any(first <= at <= last for first, last in innermost) for at in local)


def resources(kernel) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        # a cubin may hold functions that the kernel calls: the most of any
        said = re.findall(r"REG:(\d+) STACK:(\d+)", tool("cuobjdump", "-res-usage", file.name))
        registers, stack = (max(map(int, numbers)) for numbers in zip(*said, strict=True))
        sass = tool("cuobjdump", "-sass", file.name) if stack or registers < 16 else ""
    if sass and not re.search(r"\bEXIT\b", sass):
        raise RuntimeError("the compiler has made a trap of the kernel")
    spills = loop_spills(sass) if stack else 0
    shared = kernel.metadata.shared
    return {"registers": registers, "stack": stack, "loop_spills": spills, "shared": shared}


def measure_here(cc: int, known: frozenset[str] = frozenset()) -> list[dict]:
    """Compiles the kernels of one capability, but for those whose digest is known."""
    rows, errors = [], []
    for (file, name), launch in launches(cc).items():
        row = {"triton": triton.__version__, "file": file, "kernel": name, "cc": cc}
        row["source"] = digest(launch)
        if row["source"] in known:
            continue
        try:
            rows.append(row | resources(compiled(launch, cc)))
        except Exception as error:
            errors.append(f"{file}, {name}, cc {cc}: {error}")
    if errors:
        raise RuntimeError("\n\n".join(errors))
    return rows


def measure(capabilities=CAPABILITIES, known: frozenset[str] = frozenset()) -> list[dict]:
    """All kernels whose digest is not known; every capability in a process of its own, without the
    interpreter.
    """
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_DISABLE_LINE_INFO": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for cc in capabilities:
            out, log = Path(folder, f"{cc}.json"), Path(folder, f"{cc}.log")
            command = [
                sys.executable,
                "-m",
                "bench.triton_budget",
                "--cc",
                str(cc),
                "--out",
                str(out),
                "--known",
                *sorted(known),
            ]
            with log.open("w") as file:
                process = subprocess.Popen(
                    command, env=environment, cwd=ROOT, stdout=file, stderr=file
                )
            running.append((process, out, log))
        rows = []
        for process, out, log in running:
            if process.wait():
                raise RuntimeError(log.read_text()[-3000:])
            rows += json.loads(out.read_text())
    return sorted(rows, key=lambda row: tuple(row[k] for k in KEY))


def renewed() -> list[dict]:
    """All kernels, of which only those whose source is not that of their row are compiled."""
    key = lambda row: (row["cc"], row["file"], row["kernel"], row["source"])
    old = {key(row): row for row in read() if row["triton"] == triton.__version__}
    rows: list[dict] = []
    for cc in CAPABILITIES:
        found = ((cc, *names, digest(launch)) for names, launch in launches(cc).items())
        kept = [old[k] for k in found if k in old]
        rows += kept + measure([cc], frozenset(row["source"] for row in kept))
    return rows


def read(path: Path = BUDGET) -> list[dict]:
    with path.open(newline="") as file:
        return [
            {**row, **{k: int(row[k]) for k in ("cc", *COUNTS)}} for row in csv.DictReader(file)
        ]


def write(rows: list[dict], path: Path = BUDGET) -> None:
    """Replaces what was known with this Triton; what was with others stays."""
    versions = {row["triton"] for row in rows}
    kept = [row for row in read(path) if row["triton"] not in versions] if path.exists() else []
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(kept + rows, key=lambda row: tuple(row[k] for k in KEY)))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.triton_budget", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--cc", type=int, help="one compute capability, for --out")
    parser.add_argument("--out", type=Path, help="a JSON file instead of the budget")
    parser.add_argument("--known", nargs="*", default=[], help="digests to leave out, for --out")
    args = parser.parse_args()
    if args.out:
        args.out.write_text(json.dumps(measure_here(args.cc, frozenset(args.known))))
        return
    rows = renewed()
    write(rows)
    print(f"{BUDGET.relative_to(ROOT)}: {len(rows)} kernels")


if __name__ == "__main__":
    main()
