"""python -m bench.triton_versions 3.6.0 3.8.0: compiles every Triton kernel by other versions of
Triton than the installed one, for four compute capabilities, without a GPU.

Each version is installed into a folder of its own, without what it depends on, and found before the
installed one. It takes minutes a version. Fails where a kernel does not compile, spills in a loop,
or takes more shared memory than a program may.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .triton_budget import CAPABILITIES, ROOT


def install(version: str, folder: Path) -> None:
    """That version alone, into the folder."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    subprocess.run([*command, f"triton=={version}"], check=True)


def rows_of(folder: Path, cc: int) -> list[dict] | str:
    """What bench.triton_budget finds with the Triton in the folder, or what it said."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_DISABLE_LINE_INFO": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT)])
    out = folder / f"{cc}.json"
    command = [sys.executable, "-m", "bench.triton_budget", "--cc", str(cc), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return json.loads(out.read_text()) if done.returncode == 0 else done.stderr[-3000:]


def problems(rows: list[dict], cc: int) -> list[str]:
    """The kernels that spill in a loop or do not fit the device."""
    from dfkernels.ops.common.triton.device import DEVICES

    return [
        f"{row['file']}, {row['kernel']}: {row['loop_spills']} spills in a loop,"
        f" {row['shared']} bytes of shared memory"
        for row in rows
        if row["loop_spills"] or row["shared"] > DEVICES[cc].shared
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.triton_versions", description=__doc__.splitlines()[0]
    )
    parser.add_argument("versions", nargs="+", metavar="VERSION")
    bad = 0
    for version in parser.parse_args().versions:
        with tempfile.TemporaryDirectory() as name:
            install(version, Path(name))
            for cc in CAPABILITIES:
                rows = rows_of(Path(name), cc)
                found = [rows] if isinstance(rows, str) else problems(rows, cc)
                count = "none" if isinstance(rows, str) else len(rows)
                used = {} if isinstance(rows, str) else {row["triton"] for row in rows}
                if used and used != {version}:
                    found.append(f"Triton {used} was used")
                bad += len(found)
                verdict = "\n".join(found) or "nothing spills in a loop, and all fit the device"
                print(f"Triton {version}, cc {cc}, {count} kernels: {verdict}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
