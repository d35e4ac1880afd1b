"""python -m tools.new_op: the op that it lays out passes the tests of every op over a data set."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from documents import blocks

from tools.new_op import lay_out

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_example_op_passes_the_tests(tmp_path):
    """In a copy of the checkout, under another name: values, first derivatives, schema, opcheck and
    errors, without compiled kernels."""
    for name in ("dfkernels", "tests", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def python(*arguments):
        run = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
        return run.stdout

    printed = python("tools.new_op", "skewness")
    assert printed.splitlines()[:4] == [
        "dfkernels/ops/__init__.py",
        "tools/op_table.py",
        "dfkernels/ops/skewness/__init__.py",
        "dfkernels/ops/skewness/reference.py",
    ]
    files = [
        f"tests/test_{name}.py" for name in ("reference", "gradcheck", "registration", "errors")
    ]
    chosen = "skewness and (plain or prior or test_errors or test_schema)"
    summary = python("pytest", "-p", "no:cacheprovider", "-k", chosen, *files)
    assert int(re.search(r"(\d+) passed", summary)[1]) > 30


def test_contributing_quotes_the_example_op():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    reference, declaration = blocks(text, "python")
    assert (
        textwrap.indent(reference, "    ") in (ROOT / "tests/example_op/reference.py").read_text()
    )
    assert declaration in (ROOT / "tests/example_op/__init__.py").read_text()


@pytest.mark.parametrize("name", ["Third", "a-b", "1st", "lambda", "", "posterior"])
def test_names_that_cannot_be(name):
    with pytest.raises(ValueError, match=r"^name: "):
        lay_out(name)
