"""The inner loops of csrc/simd against plain loops in C++: for the instruction sets of this machine
and, where Debian's cross compiler and qemu-user are installed, for aarch64."""

from __future__ import annotations

import importlib
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests/cpp/inner_loops.cpp"
CROSS, QEMU, LIBRARIES = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"


@pytest.fixture
def native(monkeypatch):
    """_build/native.py as the build imports it."""
    monkeypatch.syspath_prepend(str(ROOT / "_build"))
    yield importlib.import_module("native")
    sys.modules.pop("native")


def outcome(native, compiler, flags, runner, directory):
    """What the compiled program prints."""
    native.write_headers(directory / "generated")
    program = directory / "inner_loops"
    options = [f for f in native.FLAGS if f not in ("-O3", "-fPIC")]
    options += ["-O1", *flags, f"-I{ROOT / 'csrc'}", f"-I{directory}"]
    subprocess.run([*compiler, *options, SOURCE, "-o", program], check=True)
    return subprocess.run([*runner, str(program)], capture_output=True, text=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["base", "v3", "v4"])
def test_on_this_machine(native, isa, tmp_path):
    try:
        compiler = native.compiler()
    except native.NoNative as error:
        pytest.skip(str(error))
    if isa not in native.isa_levels(compiler):
        pytest.skip(f"{isa} is not for {platform.machine()}")
    if isa != "base" and not runs(compiler, isa, tmp_path):
        pytest.skip(f"this CPU has no {isa}")
    assert outcome(native, compiler, native.ISAS[isa], [], tmp_path) == "0 wrong\n"


def runs(compiler, isa, directory):
    """Whether this CPU has the instruction set."""
    source = f'int main() {{ return !__builtin_cpu_supports("x86-64-{isa}"); }}'
    program = directory / "has"
    subprocess.run(
        [*compiler, "-x", "c++", "-", "-o", program], input=source, text=True, check=True
    )
    return subprocess.run([program]).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which(CROSS) or not shutil.which(QEMU),
    reason=f"{CROSS} and {QEMU} are not installed",
)
def test_on_aarch64(native, tmp_path):
    found = outcome(native, [CROSS], [], [QEMU, "-L", LIBRARIES], tmp_path)
    assert found == "0 wrong\n"
