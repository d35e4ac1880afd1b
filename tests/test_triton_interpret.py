"""The Triton kernels' arithmetic without a GPU: the files in tests/interpreted.

In a process of their own: Triton decides at import whether to compile or to interpret.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
FILES = sorted(p for p in (HERE / "interpreted").glob("*.py") if p.stem != "conftest")
LONG = ("data_ops", "expanded", "one_pass")  # a process each; the others share one, and its start
GROUPS = {name: [HERE / "interpreted" / f"{name}.py"] for name in LONG}
GROUPS["others"] = [p for p in FILES if p.stem not in LONG]


@pytest.mark.slow
@pytest.mark.parametrize("paths", GROUPS.values(), ids=GROUPS.keys())
def test_interpreted(paths):
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--durations=5",
        *map(str, paths),
    ]
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
