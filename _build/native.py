"""Compiles csrc/ into dfkernels/_C with ninja; imports neither setuptools nor torch.

Every .cpp below csrc/ is compiled once, except simd/kernels.cpp: once per instruction set, each
with its own table. The stable ABI (TORCH_TARGET_VERSION) makes one binary serve every torch from
2.10 on.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH_MIN = (2, 10)
TORCH_TARGET = f"0x{TORCH_MIN[0]:02x}{TORCH_MIN[1]:02x}000000000000"
# never -ffast-math: its start-up code sets flush-to-zero for the whole process
FLAGS = [
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-pthread",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
]
ISAS = {
    "base": [],
    "v3": ["-march=x86-64-v3"],
    "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}
MULTI = "simd/kernels.cpp"


CONSTANTS = ROOT / "dfkernels/_constants.py"


class NoNative(Exception):
    """The compiled part cannot be built here; the message says why."""


def environment_paths() -> list[Path]:
    """Where the target environment keeps its packages, also from inside pip's isolation.

    pip builds with the environment's own interpreter and hides its packages by editing sys.path
    only, so that sysconfig and site still tell the truth.
    """
    paths = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        paths.append(site.getusersitepackages())
    paths += [p for p in sys.path if p]
    return [Path(p) for p in dict.fromkeys(paths)]


def torch_version(torch: Path) -> str | None:
    """The version of the package at `torch`, read without importing it; None when there is none."""
    try:
        text = (torch / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^__version__ = ['\"]([^'\"]+)", text, re.M)
    return match.group(1) if match else None


def find_torch(paths: list[Path] | None = None) -> tuple[Path, str] | None:
    """(directory, version) of the first torch >= 2.10 on `paths` that brings its headers."""
    for path in environment_paths() if paths is None else paths:
        torch = path / "torch"
        version = torch_version(torch)
        if version is None or not (torch / "include/torch/csrc/stable/library.h").is_file():
            continue
        if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) >= TORCH_MIN:
            return torch, version
    return None


def compiler() -> list[str]:
    """The C++ compiler as an argument list: $CXX, else c++, g++, clang++. Raises NoNative."""
    if sys.platform != "linux":
        raise NoNative(f"the native part is built on Linux only; this is {sys.platform}")
    chosen = os.environ.get("CXX")
    for name in [chosen] if chosen else ["c++", "g++", "clang++"]:
        words = shlex.split(name)
        if words and shutil.which(words[0]):
            return words
    raise NoNative(
        f"CXX={chosen}: no such program"
        if chosen
        else "no C++ compiler (c++, g++, clang++) on PATH"
    )


def accepts(cxx: list[str], flags: list[str]) -> bool:
    run = subprocess.run(
        [*cxx, *flags, "-x", "c++", "-", "-fsyntax-only"], input="", text=True, capture_output=True
    )
    return run.returncode == 0


def isa_levels(cxx: list[str]) -> list[str]:
    """What simd/kernels.cpp is compiled for: base and, on x86-64, the levels that the compiler
    knows."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return [isa for isa, flags in ISAS.items() if not flags or (x86 and accepts(cxx, flags))]


def ninja() -> str:
    found = shutil.which("ninja")
    if found is None:
        try:
            import ninja as package
        except ImportError:
            raise NoNative("ninja not found (pip install ninja)") from None
        found = str(Path(package.BIN_DIR) / "ninja")
    return found


def system_headers(*paths: Path | str) -> list[str]:
    return [word for path in paths for word in ("-isystem", str(path))]


def generated_headers() -> dict[str, str]:
    """The C++ headers that the build writes, by name: the constants that Python shares, and the
    moment kinds, which are the headers in csrc/moments."""
    text = CONSTANTS.read_text(encoding="utf-8")
    constants = re.findall(r"^([A-Z_]+) = (\d+)  # (.+)$", text, re.M)
    lines = [f"inline constexpr int64_t {n.lower()} = {v};  // {what}" for n, v, what in constants]
    constants_text = ["#include <stdint.h>", "namespace dfk {", *lines, "}  // namespace dfk"]
    kinds = sorted(path.stem for path in (ROOT / "csrc/moments").glob("*.h"))
    rows = " ".join(f"X({kind}, {kind.title().replace('_', '')})" for kind in kinds)
    texts = {
        "constants.h": constants_text,
        "moment_kinds.h": [f"#define DFK_MOMENT_KINDS(X) {rows}"],
        "moments.h": [f'#include "moments/{kind}.h"' for kind in kinds],
    }
    head = ["// Written by _build/native.py; do not edit.", "#pragma once"]
    return {name: "\n".join([*head, *text, ""]) for name, text in texts.items()}


def write_headers(directory: Path) -> None:
    """Writes the generated headers; one that is unchanged keeps its time, so that nothing is
    compiled again."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in generated_headers().items():
        path = directory / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def ninja_text(cxx: list[str], torch: Path, torch_at_build: str, output: str) -> str:
    """build.ninja that links `output`; headers are tracked through depfiles, flags through ninja's
    log."""
    try:
        import pybind11
    except ImportError:
        raise NoNative("pybind11 not found (pip install pybind11)") from None

    levels = isa_levels(cxx)
    flags = FLAGS + shlex.split(os.environ.get("CXXFLAGS", ""))
    flags += [
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        *(f"-DDFK_HAVE_{isa.upper()}=1" for isa in levels),
    ]
    info = {"FLAGS": " ".join(flags), "ISAS": " ".join(levels), "TORCH": torch_at_build}
    flags += [f"-I{ROOT / 'csrc'}", "-I."]  # the build directory has generated/
    # torch's headers and pybind11's never meet in one file: torch carries a pybind11 of its own,
    # which some versions (2.11) forbid beside TORCH_TARGET_VERSION. Only host/module.cpp binds, and
    # it needs none of torch's; an isolated build has pybind11 at a new path every time, and would
    # else recompile everything.
    tensors = system_headers(torch / "include")
    module = system_headers(pybind11.get_include(), sysconfig.get_path("include"))
    module += [f'-DDFK_BUILD_{key}="{value}"' for key, value in info.items()]
    link = [
        "-shared",
        "-pthread",
        *shlex.split(os.environ.get("LDFLAGS", "")),
        f"-L{torch / 'lib'}",
    ]
    # No rpath: `import dfkernels` loads torch first, and the loader takes the libtorch_cpu that is
    # there.
    libraries = ["-Wl,--as-needed", "-ltorch_cpu"]

    def escape(path: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path))

    def command(words: list[str], *rest: str) -> str:
        return " ".join([shlex.join(words).replace("$", "$$"), *rest])

    lines = [
        "ninja_required_version = 1.5",
        "rule cxx",
        f"  command = {command([*cxx, *flags], '$extra -MD -MF $out.d -c $in -o $out')}",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = CXX $out",
        "rule link",
        f"  command = {command([*cxx, *link], '$in', *libraries, '-o $out')}",
        "  description = LINK $out",
    ]
    objects = []
    for source in sorted((ROOT / "csrc").rglob("*.cpp")):
        variants = {"": tensors}
        name = source.relative_to(ROOT / "csrc").with_suffix("").as_posix()
        if f"{name}.cpp" == MULTI:
            variants = {f"-{isa}": [f"-DDFK_ISA={isa}", *ISAS[isa]] for isa in levels}
        elif name == "host/module":
            variants = {"": module}
        for suffix, extra in variants.items():
            objects.append(f"{name}{suffix}.o")
            lines += [f"build {objects[-1]}: cxx {escape(source)}", f"  extra = {command(extra)}"]
    lines += [f"build {output}: link {' '.join(objects)}", f"default {output}", ""]
    return "\n".join(lines)


def build(destination: Path, build_dir: Path) -> Path:
    """Compile what changed and put _C into `destination`. Raises NoNative, with the reason."""
    cxx = compiler()
    found = find_torch()
    if found is None:
        raise NoNative(
            f"no torch >= {'.'.join(map(str, TORCH_MIN))} with its headers in the environment"
        )
    program = ninja()
    output = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
    build_dir.mkdir(parents=True, exist_ok=True)
    write_headers(build_dir / "generated")
    (build_dir / "build.ninja").write_text(ninja_text(cxx, *found, output), encoding="utf-8")
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    run = subprocess.run(
        [program, "-C", str(build_dir), *jobs],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    print(run.stdout, flush=True)
    if run.returncode != 0:
        wrong = [
            line for line in run.stdout.splitlines() if "error" in line.lower()
        ] or run.stdout.splitlines()[-1:]
        raise NoNative(f"{shlex.join(cxx)} failed: {wrong[0].strip() if wrong else 'no output'}")
    target = destination / output
    destination.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(target.name + ".new")
    shutil.copy2(build_dir / output, fresh)
    os.replace(fresh, target)  # a process that has the old one loaded keeps it
    return target
