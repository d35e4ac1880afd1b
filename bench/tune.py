"""python -m bench.tune: the rate of every candidate shape of the inner loops, beside the
multiply-add peak of a core, for each instruction set of this machine. csrc/simd/blocking.h holds
the choice."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    sys.path.insert(0, str(ROOT / "_build"))
    build = importlib.import_module("native")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        build.write_headers(directory / "generated")
        for isa in build.isa_levels(build.compiler()):
            program = directory / f"tune-{isa}"
            options = [*build.FLAGS, *build.ISAS[isa], f"-I{ROOT / 'csrc'}", f"-I{directory}"]
            source = ROOT / "bench/tune.cpp"
            subprocess.run([*build.compiler(), *options, source, "-o", program], check=True)
            print(isa, flush=True)
            if subprocess.run([program]).returncode:
                print(f"  this CPU does not run {isa}")


if __name__ == "__main__":
    main()
