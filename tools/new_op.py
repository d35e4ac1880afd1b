"""python -m tools.new_op NAME: lays out a new op over a data set.

Copies the example op of tests/example_op to dfkernels/ops/NAME, exports it and gives it a row in
the table of ops, so that the tests of values, derivatives, schemas, lists and errors take it up at
once. It runs in PyTorch until it has kernels; what is left to do is printed.
"""

from __future__ import annotations

import argparse
import keyword
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "tests" / "example_op"
EXAMPLE_NAME = "third_moment"
LEFT_TO_DO = """\
{name} is laid out. Next:
  dfkernels/ops/{name}/reference.py   the formula in plain PyTorch, from the definition
  dfkernels/ops/{name}/__init__.py    the sums over the atoms (_sums), and the result made of them
  tools/op_table.py                   the row: what a query costs
  python -m pytest tests -k {name} -m "not slow"
Then, for speed, with fisher_diagonal as the model:
  csrc/moments/ and csrc/ops/{name}.cpp   the kernel for CPUs
  dfkernels/ops/{name}/triton.py          that for GPUs; cuda=library.in_triton(__name__)"""


def lay_out(name: str, root: Path = ROOT) -> list[Path]:
    """Write the files of a new op over a data set into a checkout.

    Args:
        name: A Python identifier in lower case.
        root: The checkout.

    Returns:
        The files that are new or changed.

    Raises:
        ValueError: The name is no identifier in lower case, or is taken.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ValueError(f"name: expected an identifier in lower case, got {name!r}")
    folder = root / "dfkernels" / "ops" / name
    if folder.exists():
        raise ValueError(f"name: dfkernels/ops/{name} is there already")
    init, table = root / "dfkernels" / "ops" / "__init__.py", root / "tools" / "op_table.py"
    changed = {init: _exported(init.read_text(), name), table: _with_row(table.read_text(), name)}
    for source in sorted(EXAMPLE.glob("*.py")):
        text = source.read_text().replace(EXAMPLE_NAME, name)
        text = re.sub(r"from dfkernels\._torch", "from ..._torch", text)
        text = re.sub(r"from dfkernels\.ops\.", "from ..", text)
        changed[folder / source.name] = text.replace("\n\nfrom .reference", "\nfrom .reference")
    folder.mkdir()
    for path, text in changed.items():
        path.write_text(text)
    return list(changed)


def _exported(text: str, name: str) -> str:
    """dfkernels/ops/__init__.py with one more op, wherever fisher_diagonal stands."""
    model = "fisher_diagonal"
    lines = []
    for line in text.splitlines():
        lines.append(line)
        if re.fullmatch(rf'from \.{model} import {model}|    "?{model}"?,', line):
            lines.append(line.replace(model, name))
    return "\n".join(lines) + "\n"


def _with_row(text: str, name: str) -> str:
    """tools/op_table.py with one more row, before the ops that read no data set."""
    row = f'        OpSpec("{name}", moments=lambda d, K: 3),\n'
    before, marker, after = text.partition('        OpSpec(\n            "endpoint_matvec"')
    if not marker:
        raise ValueError("tools/op_table.py: found no place for the row")
    return before + row + marker + after


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.new_op", description="Lays out the files of a new op over a data set."
    )
    parser.add_argument("name", help="in lower case, as in fisher_diagonal")
    name = parser.parse_args().name
    try:
        files = lay_out(name)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(str(path.relative_to(ROOT)) for path in files))
    print(LEFT_TO_DO.format(name=name))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
